"""How good, how fast: streaming metrics and their names."""
