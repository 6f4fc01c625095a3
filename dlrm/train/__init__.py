"""The run: model, optimizers, loop, summary."""
