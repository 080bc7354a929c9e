"""What is known of each dimension, and the weights made from it."""
