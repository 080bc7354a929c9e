"""Whether each latent stands for one thing."""
