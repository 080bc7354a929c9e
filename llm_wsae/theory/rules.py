"""The rules and arms of the planted experiments.

A rule sees what it would see of a real model (samples, and for some a first dictionary), or, for
an oracle, the truth. An arm is a rule with an exponent and a way to use the weights. ``random``
and ``permuted`` are the controls: what any weights do, whatever they are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.statistics import scores
from llm_wsae.statistics.moments import Statistics
from llm_wsae.theory.superposition import Planted


@dataclass(frozen=True)
class Evidence:
    """What a rule may look at."""

    statistics: Statistics
    """Statistics of observed rows, with their sample."""
    truth: Planted
    """For the oracles only."""
    seed: int
    """For the controls."""
    decoder: Float[Tensor, "latents n_p"] | None = None
    """Of a first, plain dictionary; None while there is none."""
    energy: Float[Tensor, " latents"] | None = None
    """Mean square of that dictionary's codes."""

    @property
    def samples(self) -> Float[Tensor, "rows n_p"]:
        """Observed rows."""
        return self.statistics.usual_sample


Rule = Callable[[Evidence], Tensor]

RULES: dict[str, Rule] = {
    "uniform": lambda e: torch.ones(e.statistics.d_in, dtype=torch.float64),
    "variance": lambda e: e.statistics.variance,
    "robust-variance": lambda e: e.statistics.robust_variance,
    "kurtosis": lambda e: scores.kurtosis(e.samples),
    "hoyer": lambda e: scores.hoyer(e.samples),
    "negentropy": lambda e: scores.negentropy(e.samples),
    "participation": lambda e: scores.participation(_first(e), e.energy),
    "gap": lambda e: scores.gap(_first(e)),
    "participation-true": lambda e: e.truth.monosemanticity,
    "gap-true": lambda e: scores.gap(e.truth.mixing.T),
    "random": lambda e: scores.random_scores(e.statistics.d_in, e.seed),
    "permuted": lambda e: scores.permuted(e.truth.monosemanticity, e.seed),
}
NEED_DICTIONARY = ("participation", "gap")
CONTROLS = ("random", "permuted")


def _first(evidence: Evidence) -> Tensor:
    assert evidence.decoder is not None, "this rule needs a first dictionary"
    return evidence.decoder


@dataclass(frozen=True)
class Arm:
    """A rule and how its weights are used."""

    rule: str
    alpha: float = 1.0
    """γ = s^α."""
    annealed: bool = False
    """Whether γ moves to 1 between 40 and 70 % of the training."""
    standardised: bool = False
    """Train on inputs of unit variance, plain loss; fold the factors back."""

    @property
    def control(self) -> str | None:
        """Name of the arm that gives random weights on the same schedule; None for a control."""
        if self.rule in CONTROLS or self.rule == "uniform":
            return None
        return arm_name("random", self.annealed)


def arm_name(rule: str, annealed: bool = False, alpha: float = 1.0) -> str:
    """``hoyer``, ``variance-a0.5``, ``gap-annealed``."""
    exponent = "" if alpha == 1 else f"-a{alpha:g}"
    return f"{rule}{exponent}{'-annealed' if annealed else ''}"


def _arms() -> dict[str, Arm]:
    arms = {"plain": Arm("uniform"), "standardised": Arm("uniform", standardised=True)}
    for rule, alpha in (("variance", -0.25), ("variance", 0.5), ("robust-variance", 0.5)):
        arms[arm_name(rule, alpha=alpha)] = Arm(rule, alpha)
    for rule in ("variance", "kurtosis", "negentropy"):
        arms[arm_name(rule)] = Arm(rule)
    for rule in ("hoyer", *NEED_DICTIONARY, "participation-true", "gap-true", *CONTROLS):
        for annealed in (False, True):
            arms[arm_name(rule, annealed)] = Arm(rule, annealed=annealed)
    return arms


ARMS: dict[str, Arm] = _arms()
PLAIN = "plain"


def score(rule: str, evidence: Evidence) -> Float[Tensor, " n_p"]:
    """The score of every observed dimension (float64)."""
    return RULES[rule](evidence)


def gamma(arm: Arm, evidence: Evidence) -> Float[Tensor, " n_p"]:
    """The arm's weights γ = s^α, the largest 1. A score of 0 keeps weight 0 for a positive α; under
    a negative one it gets the largest finite weight."""
    s = score(arm.rule, evidence).float()
    floor = s[s > 0].min() if arm.alpha < 0 else 0.0
    weights = s.clamp(min=floor) ** arm.alpha
    return weights / weights.max()


def scale(arm: Arm, evidence: Evidence) -> Float[Tensor, " n_p"]:
    """Factors of the inputs before the dictionary sees them: 1/σ if standardised, else 1."""
    if arm.standardised:
        return evidence.statistics.variance.clamp(min=1e-12).rsqrt().float()
    return torch.ones(evidence.statistics.d_in)
