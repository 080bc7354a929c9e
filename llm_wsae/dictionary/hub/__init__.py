"""Dictionaries on the Hugging Face Hub."""
