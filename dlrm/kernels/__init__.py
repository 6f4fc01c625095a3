"""Fast operators behind the modules, each with a plain PyTorch twin it is tested against."""
