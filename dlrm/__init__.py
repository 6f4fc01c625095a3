"""Trains deep learning recommendation models on TorchRec, from click logs to a measured model."""

__version__ = "0.1.0"
