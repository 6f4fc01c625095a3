"""Tables and a cluster become a plan (search, placement), a plan a sharded model (shard). Knows TorchRec's planner."""
