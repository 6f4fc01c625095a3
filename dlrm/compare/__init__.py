"""In what two runs differ."""
