"""The language model: its sites, forward passes to a site and on from it, its fingerprint."""

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
"""The default sentence encoder; here, so that configurations can name it without torch."""
