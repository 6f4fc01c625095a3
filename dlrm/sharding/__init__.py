"""Tables x topology -> plan; plan -> sharded model."""
