"""Edits of chosen latents while a model runs: ablate, clamp, scale, steer.

An edit maps a latent's activations to new ones, token by token. Its effect on the stream follows
from the decoder: for every unit that a latent gains, its decoder row is added once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, SupportsIndex, runtime_checkable

from jaxtyping import Float
from torch import Tensor

Latents = SupportsIndex | Iterable[SupportsIndex]
"""A number (also of numpy or torch), or several."""
Function = Callable[[Tensor], Tensor | None]
"""Receives all latents [contexts, positions, d_sae]; what it returns replaces them."""


@runtime_checkable
class Edit(Protocol):
    """A change of some latents at some positions."""

    @property
    def latent(self) -> Latents:
        """One latent or several."""
        ...

    @property
    def positions(self) -> slice | None:
        """Positions of the token ids that it is restricted to."""
        ...

    def change(self, values: Float[Tensor, "rows latents"]) -> Float[Tensor, "rows latents"]:
        """The new activations of the edit's latents."""
        ...


@dataclass(frozen=True)
class Ablate:
    """Set the activations of latents to 0."""

    latent: Latents
    """One latent or several; duplicates count once."""
    positions: slice | None = None
    """Positions of the token ids, generated ones included, counted from the first:
    ``slice(ids.shape[1], None)`` is what is generated after ``ids``. None: all."""

    def change(self, values: Float[Tensor, "rows latents"]) -> Float[Tensor, "rows latents"]:
        """0."""
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
        """The value."""
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
        """The activations times the factor."""
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
        """The activations plus the strength."""
        return values + self.strength
