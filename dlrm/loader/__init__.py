"""Rows of a data set become batches, rank by rank."""
