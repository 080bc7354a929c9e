"""The rules and arms of the planted experiments.

The rules are those of ``statistics.monosemanticity`` that need no language model, on what they
would see of a real one: observed rows, and for some a first dictionary. Beside them the oracles,
which know the truth. An arm is a rule with an exponent and a way to use the weights. The controls
are what any weights do, whatever they are: ``random``, and ``permuted``, which are those of the
truth on the wrong dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from llm_wsae.statistics import monosemanticity, scores
from llm_wsae.statistics.evidence import Evidence
from llm_wsae.theory.superposition import Planted

PLAIN_RULE = "uniform"
_NO_MODEL = (None, "dictionary")  # what a rule may need here
_SEEING = tuple(
    name for name, rule in monosemanticity.RULES.items() if rule.score and rule.need in _NO_MODEL
)
_KNOWING: dict[str, Callable[[Planted, int], Tensor]] = {
    "participation-true": lambda truth, draw: truth.monosemanticity,
    "gap-true": lambda truth, draw: scores.gap(truth.mixing.T),
    "permuted": lambda truth, draw: scores.permuted(truth.monosemanticity, draw),
}
RULES = (*_SEEING, *_KNOWING)
NEED_DICTIONARY = tuple(name for name in _SEEING if monosemanticity.need_of(name))
CONTROLS = ("random", "permuted")


@dataclass(frozen=True)
class Known:
    """What rules and oracles may look at."""

    evidence: Evidence
    truth: Planted
    draw: int
    """Number of the controls' random draw."""


def score(rule: str, known: Known) -> Float[Tensor, " n_p"]:
    """The score of every observed dimension (float64)."""
    if rule in _KNOWING:
        return _KNOWING[rule](known.truth, known.draw)
    return monosemanticity.score(rule, known.evidence, known.draw)


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
    def controls(self) -> tuple[str, ...]:
        """Names of the arms that use arbitrary weights in the same way; none for a control."""
        if self.rule in CONTROLS or self.rule == PLAIN_RULE:
            return ()
        same = (arm_name(rule, annealed=self.annealed, space=self.space) for rule in CONTROLS)
        return tuple(name for name in same if name in ARMS)


def arm_name(rule: str, alpha: float = 1.0, *, annealed: bool = False, space: bool = False) -> str:
    """``hoyer``, ``variance-a0.5``, ``gap-annealed``, ``random-space``."""
    exponent = "" if alpha == 1 else f"-a{alpha:g}"
    return f"{rule}{exponent}{'-annealed' if annealed else ''}{'-space' if space else ''}"


def _arms() -> dict[str, Arm]:
    arms = {"plain": Arm(PLAIN_RULE), "standardised": Arm("variance", -0.5, space=True)}
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


def weights(arm: Arm, known: Known) -> Float[Tensor, " n_p"]:
    """The arm's weights γ = s^α, the largest 1. A score of 0 keeps weight 0 for a positive α; under
    a negative one it gets the largest finite weight."""
    s = score(arm.rule, known)
    if arm.alpha < 0:
        s = s.clamp(min=float(s[s > 0].min()))
    raised = s**arm.alpha
    return (raised / raised.max()).float()
