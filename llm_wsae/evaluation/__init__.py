"""How faithful dictionaries are to the model, and how monosemantic their latents are."""
