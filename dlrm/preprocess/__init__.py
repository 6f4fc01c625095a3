"""Raw click logs become training rows: binary days and their manifest."""
