"""What can be done to chosen latents while a model runs: four words for the usual things.

An edit maps a latent's activations to new ones, token by token. What that does to the stream
follows from the decoder: for every unit that a latent gains, one more of its decoder row is added.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, SupportsIndex, runtime_checkable

from jaxtyping import Float
from torch import Tensor

Latents = SupportsIndex | Iterable[SupportsIndex]
"""A number, also one of numpy or torch, or several."""
Function = Callable[[Tensor], Tensor | None]
"""Sees all latents [contexts, positions, d_sae]; what it returns takes their place."""


@runtime_checkable
class Edit(Protocol):
    """A change of some latents at some positions."""

    latent: Latents
    positions: slice | None

    def change(self, values: Float[Tensor, "rows latents"]) -> Float[Tensor, "rows latents"]:
        """The new activations of the edit's latents."""
        ...


@dataclass(frozen=True)
class Ablate:
    """Silence latents: their activations become 0."""

    latent: Latents
    """One latent or several, each of which counts once."""
    positions: slice | None = None
    """Positions of the token ids, generated ones included, counted from the first:
    ``slice(ids.shape[1], None)`` is what is generated behind ``ids``. None: all."""

    def change(self, values: Float[Tensor, "rows latents"]) -> Float[Tensor, "rows latents"]:
        """0."""
        return values * 0


@dataclass(frozen=True)
class Clamp:
    """Hold latents at a value, whether they fire or not."""

    latent: Latents
    """One latent or several, each of which counts once."""
    value: float
    """Their activation."""
    positions: slice | None = None
    """Positions of the token ids, as in ``Ablate``."""

    def change(self, values: Float[Tensor, "rows latents"]) -> Float[Tensor, "rows latents"]:
        """The value."""
        return values * 0 + self.value


@dataclass(frozen=True)
class Scale:
    """Multiply the activations of latents."""

    latent: Latents
    """One latent or several, each of which counts once."""
    factor: float
    """By how much."""
    positions: slice | None = None
    """Positions of the token ids, as in ``Ablate``."""

    def change(self, values: Float[Tensor, "rows latents"]) -> Float[Tensor, "rows latents"]:
        """Factor times as much."""
        return values * self.factor


@dataclass(frozen=True)
class Steer:
    """Push the stream along latents' decoder directions: their activations grow by a constant."""

    latent: Latents
    """One latent or several, each of which counts once."""
    strength: float
    """In units of the latent's activation: ``strength`` decoder rows are added; negative pushes
    away."""
    positions: slice | None = None
    """Positions of the token ids, as in ``Ablate``."""

    def change(self, values: Float[Tensor, "rows latents"]) -> Float[Tensor, "rows latents"]:
        """The strength more."""
        return values + self.strength
