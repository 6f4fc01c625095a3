"""`dlrm compare`: what differs between two runs. It reads run directories and checkpoints and writes nothing."""
