"""The sparse operations a training step is made of.

``operations`` has the public functions. Each picks one of the implementations of the same
signatures at call time: ``pytorch`` (any device), ``cpu`` (C++) or ``triton`` (CUDA).
"""
