"""Every knob of a run: the fields, what is refused of them, and how a command line becomes them. No torch here."""
