"""Held-out rows scored, by a training or from a checkpoint."""
