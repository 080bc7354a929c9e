"""Latents one by one: where each fires, and what those places have in common."""
