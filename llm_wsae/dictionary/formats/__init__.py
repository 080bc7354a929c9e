"""Dictionaries written by other tools: one module per layout; ``reading`` tells which it is."""
