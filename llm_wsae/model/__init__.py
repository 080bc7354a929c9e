"""The language model: sites, forward passes up to a site, splicing."""
