"""The stages of a preprocessing run. Every rank calls each of them, in order."""
