"""Raw click logs become binary days."""
