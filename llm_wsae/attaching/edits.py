"""Edits of chosen latents while a model runs: ablate, clamp, scale, steer.

An edit maps a latent's activations to new ones, token by token. For every unit that a latent gains,
its decoder row is added to the stream once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import SupportsIndex

from jaxtyping import Float
from torch import Tensor

Latents = SupportsIndex | Iterable[SupportsIndex]
"""A number (also of numpy or torch), or several."""
Function = Callable[[Tensor], Tensor | None]
"""Receives all latents [contexts, positions, d_sae]; what it returns replaces them."""


@dataclass(frozen=True)
class Ablate:
    """Set the activations of latents to 0."""

    latent: Latents
    """One latent or several; duplicates count once."""
    positions: slice | None = None
    """Positions of the token ids, generated ones included, counted from the first:
    ``slice(ids.shape[1], None)`` is what is generated after ``ids``. None: all."""

    def change(self, values: Float[Tensor, "rows latents"]) -> Float[Tensor, "rows latents"]:
        """The new activations."""
        return values * 0


@dataclass(frozen=True)
class Clamp:
    """Set latents to a value, whether or not they fire."""

    latent: Latents
    """One latent or several; duplicates count once."""
    value: float
    """Their activation."""
    positions: slice | None = None
    """Positions of the token ids, as in ``Ablate``."""

    def change(self, values: Float[Tensor, "rows latents"]) -> Float[Tensor, "rows latents"]:
        """The new activations."""
        return values * 0 + self.value


@dataclass(frozen=True)
class Scale:
    """Multiply the activations of latents."""

    latent: Latents
    """One latent or several; duplicates count once."""
    factor: float
    """The factor."""
    positions: slice | None = None
    """Positions of the token ids, as in ``Ablate``."""

    def change(self, values: Float[Tensor, "rows latents"]) -> Float[Tensor, "rows latents"]:
        """The new activations."""
        return values * self.factor


@dataclass(frozen=True)
class Steer:
    """Move the stream along latents' decoder directions: adds a constant to their activations."""

    latent: Latents
    """One latent or several; duplicates count once."""
    strength: float
    """In units of the latent's activation: ``strength`` times the decoder row is added; negative
    values move the other way."""
    positions: slice | None = None
    """Positions of the token ids, as in ``Ablate``."""

    def change(self, values: Float[Tensor, "rows latents"]) -> Float[Tensor, "rows latents"]:
        """The new activations."""
        return values + self.strength


Edit = Ablate | Clamp | Scale | Steer
