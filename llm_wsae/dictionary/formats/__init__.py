"""Dictionaries written by other tools: one module per layout; ``reading`` tells which it is.

Every reader returns what a folder of this package would hold. Whatever the other tool does to the
input before the encoder and to the output after the decoder is folded into the tensors, so that
encoding and decoding equal the other tool's.
"""
