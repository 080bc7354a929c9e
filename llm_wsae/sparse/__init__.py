"""The sparse operations a training step is made of.

``operations`` has the public functions. Each picks one of the implementations of the same
signatures at call time: ``reference`` (dense, the definition), ``plain`` (torch, any device),
``compiled`` (C++ on the CPU) or ``triton`` (CUDA).
"""
