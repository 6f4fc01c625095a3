"""The processes of a run: who started them, where they meet, what each has of its host."""
