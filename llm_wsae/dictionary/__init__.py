"""Dictionaries: the module, its sparsity, its folder on disk, its repository on the Hub."""
