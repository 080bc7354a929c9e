"""Concepts whose truth is known, and how well latents stand for them."""
