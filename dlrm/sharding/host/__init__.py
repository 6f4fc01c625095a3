"""Surgery on TorchRec's sharded modules, so that the ranks of a CPU host meet in shared memory."""
