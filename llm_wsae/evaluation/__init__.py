"""What a dictionary keeps of the model it explains."""
