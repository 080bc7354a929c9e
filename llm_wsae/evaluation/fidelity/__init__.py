"""How faithful dictionaries are to the model."""
