"""Weighted sparse autoencoders for the residual streams of real language models."""
