"""Sparse codes: what an encoder with a fixed number of active latents returns."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class Codes(NamedTuple):
    """The active latents of a batch. A value of 0 is an unused slot, whatever its index."""

    indices: Int[Tensor, "batch k"]
    """Latent numbers, int64, in no particular order."""
    values: Float[Tensor, "batch k"]
    """Latent activations, ≥ 0."""
