"""What a language model says about latents, and how well it then recognises them."""
