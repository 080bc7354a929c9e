"""The language model: its sites, forward passes to a site and on from it, its fingerprint."""
