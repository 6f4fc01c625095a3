"""What a training would take on a cluster that is not available: its plan, its memory, the time of a step."""
