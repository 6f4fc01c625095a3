"""What a training step costs, as arithmetic: bytes, operations, seconds. No torch here."""
