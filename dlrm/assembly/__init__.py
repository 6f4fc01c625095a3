"""Model, plan, optimizer, pipeline and data of a config, put together on the ranks there are."""
