"""Checkpoints: written, found, checked, read at any world size and sharding."""
