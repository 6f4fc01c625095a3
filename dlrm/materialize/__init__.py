"""One-hot days become multi-hot ones."""
