"""Do the tokens that a latent fires on agree? Purity and entropy of its examples' tokens.

A latent for one token has purity 1 and entropy 0. Both see the token alone, so a latent for a
meaning that many words express looks impure: read them together with the coherence of the windows.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.evaluation.monosemanticity.latents.firings import NO_ROW


class Purity(NamedTuple):
    """How far the tokens of each latent's examples agree; NaN for a latent without examples."""

    purity: Float[Tensor, " latents"]
    """Share of the most frequent token."""
    entropy: Float[Tensor, " latents"]
    """Entropy of the tokens' frequencies, in bits; at most log2 of the number of examples."""


def token_purity(rows: Int[Tensor, "latents examples"], token: Int[Tensor, " rows"]) -> Purity:
    """Purity of the ``token`` at each latent's rows; a row of -1 is no example."""
    there = rows != NO_ROW
    found = token[rows.clamp(min=0)]
    same = (found[:, :, None] == found[:, None, :]) & there[:, None, :]  # [latents, each, others]
    alike = same.sum(2).double()
    number = there.sum(1).double()
    share = alike / number[:, None]
    # A token of frequency f appears in f·number examples, so this mean is Σ f log2(1/f).
    surprise = torch.where(there, -share.log2(), 0.0).sum(1) / number
    purity = torch.where(there, share, 0.0).amax(1)
    return Purity(purity.where(number > 0, torch.nan), surprise)
