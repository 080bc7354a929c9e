"""Settings: how scores become weights, where these act, what is measured. Imports no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from llm_wsae.errors import UsageError
from llm_wsae.outside import check_choices, check_numbers

Place = Literal["auto", "loss", "space"]
Form = Literal["auto", "diagonal", "matrix"]


@dataclass(frozen=True)
class WeightConfig:
    """How loss weights are made, whatever the rule."""

    place: Place = "auto"
    """Where Γ acts: in the loss (on the reconstruction error alone), or as a space to train in,
    which is folded back at the end. auto: the loss, unless a weights file was made otherwise."""
    form: Form = "auto"
    """One weight for each dimension (diagonal) or a full matrix Γ, for rules that have one.
    auto: the matrix with --place space and for rules that have no diagonal form, otherwise the
    diagonal."""
    clip: float | None = None
    """Keep the weights (of a matrix: its eigenvalues) within this factor of their median."""
    anneal: float = 0.0
    """Share of the steps over which γ moves to 1, from the first step; 0 keeps γ throughout."""
    draw: int = 0
    """Random seed of controls."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choices(self, place=get_args(Place), form=get_args(Form))
        if self.clip is not None and self.clip < 1:
            raise UsageError(f"clip must be a factor of at least 1, not {self.clip:g}")
        if not 0 <= self.anneal <= 1:
            raise UsageError(f"anneal is a share of the steps, from 0 to 1, not {self.anneal:g}")
        if self.anneal and self.in_space:
            raise UsageError(
                "only weights in the loss can be annealed: a dictionary cannot follow a "
                "space that moves; set anneal to 0 or place to loss"
            )

    @property
    def in_space(self) -> bool:
        """Whether Γ is a space to train in."""
        return self.place == "space"


IN_LOSS = WeightConfig(place="loss")
"""The settings of weights that are neither clipped, annealed nor drawn, in the loss."""


@dataclass(frozen=True)
class RuleInputConfig:
    """How much is measured for rules that need more than the statistics."""

    sensitivity_tokens: int = 40_000
    """Tokens of the store, spread over it, on which the model's sensitivity is measured.
    Each costs a forward and a backward pass."""
    seed: int = 0
    """Seed of the predicted tokens."""

    def __post_init__(self) -> None:
        check_numbers(self, sensitivity_tokens=1)
