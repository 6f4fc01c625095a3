"""What a training step costs, as arithmetic: bytes, operations, seconds. For `dlrm plan` and `dlrm bench`; no torch."""
