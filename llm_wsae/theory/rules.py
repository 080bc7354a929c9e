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
    space: bool = False
    """γ is the space the dictionary is trained in, x' = Γx_p, folded back; the loss is plain."""

    @property
    def control(self) -> str | None:
        """Name of the arm that uses random weights in the same way; None for a control."""
        if self.rule in CONTROLS or self.rule == "uniform":
            return None
        return arm_name("random", annealed=self.annealed, space=self.space)


def arm_name(rule: str, alpha: float = 1.0, *, annealed: bool = False, space: bool = False) -> str:
    """``hoyer``, ``variance-a0.5``, ``gap-annealed``, ``random-space``."""
    exponent = "" if alpha == 1 else f"-a{alpha:g}"
    return f"{rule}{exponent}{'-annealed' if annealed else ''}{'-space' if space else ''}"


def _arms() -> dict[str, Arm]:
    arms = {"plain": Arm("uniform"), "standardised": Arm("variance", -0.5, space=True)}
    for rule, alpha in (("variance", -0.25), ("variance", 0.5), ("robust-variance", 0.5)):
        arms[arm_name(rule, alpha)] = Arm(rule, alpha)
    for rule in ("variance", "kurtosis", "negentropy"):
        arms[arm_name(rule)] = Arm(rule)
    for rule in ("hoyer", *NEED_DICTIONARY, "participation-true", "gap-true", *CONTROLS):
        for annealed in (False, True):
            arms[arm_name(rule, annealed=annealed)] = Arm(rule, annealed=annealed)
    arms[arm_name("random", space=True)] = Arm("random", space=True)
    return arms


ARMS: dict[str, Arm] = _arms()
PLAIN = "plain"


def score(rule: str, evidence: Evidence) -> Float[Tensor, " n_p"]:
    """The score of every observed dimension (float64)."""
    return RULES[rule](evidence)


def weights(arm: Arm, evidence: Evidence) -> Float[Tensor, " n_p"]:
    """The arm's weights γ = s^α, the largest 1. A score of 0 keeps weight 0 for a positive α; under
    a negative one it gets the largest finite weight."""
    s = score(arm.rule, evidence)
    if arm.alpha < 0:
        s = s.clamp(min=float(s[s > 0].min()))
    raised = s**arm.alpha
    return (raised / raised.max()).float()
