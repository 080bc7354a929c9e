"""Dictionaries: the module, its sparsity, its files."""
