"""The stages of a preprocessing run. Every rank calls all of them, in order."""
