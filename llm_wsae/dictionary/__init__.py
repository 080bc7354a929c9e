"""Dictionaries: the module, its sparsity, its files, its place on the Hub."""
