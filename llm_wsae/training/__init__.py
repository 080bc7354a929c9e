"""Training of several dictionaries in one pass."""
