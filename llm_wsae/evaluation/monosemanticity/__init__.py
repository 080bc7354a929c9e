"""Whether latents stand for one thing."""
