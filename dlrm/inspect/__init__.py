"""`dlrm inspect`: what a checkpoint holds, or which checkpoints there are. It reads checkpoints and writes nothing."""
