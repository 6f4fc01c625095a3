"""One-hot days become multi-hot days. Reads a folder of days, and writes another one."""
