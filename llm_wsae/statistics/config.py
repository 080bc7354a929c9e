"""How scores become weights, and where the weights act. Free of torch, for the command line."""

from dataclasses import dataclass
from typing import Literal

from llm_wsae.errors import UsageError

Place = Literal["loss", "space"]
Form = Literal["auto", "diagonal", "matrix"]


@dataclass(frozen=True)
class WeightConfig:
    """Settings of loss weights, whatever the rule."""

    place: Place = "loss"
    """Where Γ acts: on the reconstruction error alone, or as the space in which the dictionary is
    trained, which is folded back at the end."""
    form: Form = "auto"
    """One weight for each dimension (diagonal) or a full matrix Γ, for rules that have one. auto:
    the matrix in the space and wherever there is nothing else, otherwise the diagonal."""
    clip: float | None = None
    """Keep the weights (of a matrix: its eigenvalues) within a factor of their median; default:
    no limit."""
    anneal: float = 0.0
    """Share of the steps over which γ goes to 1, from the first step on; 0 keeps γ throughout."""
    draw: int = 0
    """Number of the random draw behind the rules random, permuted:RULE and rotated:RULE."""

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip >= 1:
            raise UsageError(f"clip must be a factor of at least 1, not {self.clip:g}")
        if not 0 <= self.anneal <= 1:
            raise UsageError(f"anneal is a share of the steps, from 0 to 1, not {self.anneal:g}")
        if self.draw < 0:
            raise UsageError(f"draw must not be negative, but is {self.draw}")
        if self.anneal and self.place == "space":
            raise UsageError(
                "only weights in the loss can be annealed: a space that moves would leave the "
                "dictionary behind; set anneal to 0 or place to loss"
            )
