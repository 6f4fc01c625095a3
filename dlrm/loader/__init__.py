"""Rows of a data set become batches, rank by rank. Reads what `dataset` opens; talks to other ranks of a host."""
