"""Sizes that the Triton kernels are written for, in a module that does not need Triton."""

MOST_TRITON_VECTORS = 64
"""The most vectors of a sample that a program of the Triton interaction can hold on the chip."""
