"""Sides in turn in one call: rounds, processes, figures, and where these come from."""
