"""Dictionaries that other tools wrote: one module a layout, and ``layouts`` that tells them apart.

Every reader returns what our own folder would hold, with everything that happens to the input
before the encoder and to the output behind the decoder folded into the tensors, so that encoding
and decoding equal the other tool's.
"""
