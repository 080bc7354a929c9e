"""How faithfully dictionaries reconstruct the activations and keep the model's predictions."""
