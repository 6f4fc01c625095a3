"""An embedding table as a file that other tools read."""
