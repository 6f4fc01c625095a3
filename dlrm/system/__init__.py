"""What the operating system gives and takes: cores, memory, limits, files, locks, streams. No torch, no config here."""
