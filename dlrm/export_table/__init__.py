"""`dlrm export-table`: an embedding table of a checkpoint, written to one file that other tools read."""
