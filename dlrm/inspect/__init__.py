"""What a checkpoint holds, or which checkpoints there are."""
