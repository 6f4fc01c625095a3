"""Fast operators behind the modules. Each has a plain PyTorch twin, against which it is tested."""
