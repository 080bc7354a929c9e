"""Dictionaries inside a running model: reconstruct, read latents, edit them, steer."""
