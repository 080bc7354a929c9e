"""The sparse operations a training step is made of."""
