"""Flags of a run: fields with bounds and rules, checks across fields, recipes, and parsing of a command line.

Reads the files that flags name, and writes nothing. No torch here.
"""
