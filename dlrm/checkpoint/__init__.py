"""Checkpoints: written, found, verified, and read at any world size and sharding.

The outside world: local folders, and the object stores that fsspec knows.
"""
