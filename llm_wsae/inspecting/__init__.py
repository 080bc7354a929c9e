"""Looking at single latents of a dictionary: where they fire, what they write, who is near."""
