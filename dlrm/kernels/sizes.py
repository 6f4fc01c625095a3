"""Sizes that kernels are written for, without loading what they need."""

MOST_TRITON_VECTORS = 64
"""Vectors of a sample that a program of the Triton interaction holds on the chip."""
