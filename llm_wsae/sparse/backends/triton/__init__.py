"""The sparse operations on CUDA, in Triton."""
