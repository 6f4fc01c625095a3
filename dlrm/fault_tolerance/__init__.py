"""A run outlives signals, hanging ranks and lost hosts: what ranks agree on, and when a checkpoint is due."""
