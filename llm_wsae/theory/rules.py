"""The rules and arms of the planted experiments.

The rules are those of ``statistics.monosemanticity`` that score dimensions, on what they would see
of a language model: observed rows, for some a first dictionary, for some what the model itself
tells (``reader.py``). Beside them the oracles, which know the truth. An arm is a rule with an
exponent and a way to use the weights. Each has two controls used in the same way: its own weights
on the wrong dimensions, and random ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import LlmWsaeError
from llm_wsae.theory.superposition import Planted
from llm_wsae.weights import rules, scores
from llm_wsae.weights.inputs import RuleInputs

PLAIN_RULE = "uniform"
RANDOM, PERMUTED = CONTROLS = ("random", "permuted")
_SEEING = tuple(name for name, rule in rules.RULES.items() if rule.score and not rule.of_tokens)
_KNOWING: dict[str, Callable[[Planted], Tensor]] = {
    "participation-true": lambda truth: truth.monosemanticity,
    "gap-true": lambda truth: scores.gap(truth.mixing.T),
}
RULES = (*_SEEING, *_KNOWING)


@dataclass(frozen=True)
class Known:
    """What rules and oracles may look at."""

    inputs: RuleInputs
    truth: Planted
    draw: int
    """Number of the controls' random draw."""


def score(rule: str, known: Known) -> Float[Tensor, " n_p"]:
    """The score of every observed dimension (float64); ``permuted:RULE`` deals a rule's out to
    other dimensions."""
    control, _, base = rule.rpartition(":")
    if base in _KNOWING:
        found = _KNOWING[base](known.truth)
        return scores.permuted(found, known.draw) if control else found
    return rules.score(rule, known.inputs, known.draw)


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
    def name(self) -> str:
        """``hoyer``, ``variance-a0.5``, ``gap-annealed``, unless it has one of its own."""
        exponent = "" if self.alpha == 1 else f"-a{self.alpha:g}"
        return f"{self.rule}{exponent}{'-annealed' if self.annealed else ''}"

    @property
    def control(self) -> str | None:
        """The kind of control that the arm is, if it is one."""
        kind = self.rule.partition(":")[0]
        return kind if kind in CONTROLS else None

    @property
    def permuted(self) -> "Arm":
        """Its own weights, used in the same way, on the wrong dimensions."""
        return replace(self, rule=f"{PERMUTED}:{self.rule}")

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the arms that use arbitrary weights in the same way; none for a control."""
        if self.control or self.rule == PLAIN_RULE:
            return ()
        random = replace(self, rule=RANDOM, alpha=1.0)
        return tuple(_NAMES[arm] for arm in (random, self.permuted) if arm in _NAMES)

    @property
    def needs_dictionary(self) -> bool:
        """Whether its rule looks at a first dictionary."""
        base = self.rule.rpartition(":")[2]
        return base not in _KNOWING and rules.need_of(base) == "dictionary"


def _arms() -> dict[str, Arm]:
    tried = [Arm("variance", -0.25), Arm("variance", 0.5), Arm("robust-variance", 0.5)]
    tried += [Arm(rule) for rule in ("variance", "kurtosis", "negentropy")]
    for rule in ("hoyer", "participation", "gap", *_KNOWING):
        tried += [Arm(rule), Arm(rule, annealed=True)]
    named = {"standardised": Arm("variance", -0.5, space=True)}
    named |= {arm.name: arm for arm in tried}
    controls = {arm.name: arm for arm in (Arm(RANDOM), Arm(RANDOM, annealed=True))}
    controls |= {f"{PERMUTED}:{name}": arm.permuted for name, arm in named.items()}
    return {PLAIN: Arm(PLAIN_RULE)} | named | controls


PLAIN = "plain"
ARMS: dict[str, Arm] = _arms()
_NAMES = {arm: name for name, arm in ARMS.items()}
SHOWN = tuple(name for name, arm in ARMS.items() if name != PLAIN and arm.control != PERMUTED)
"""The arms of tables and figures that have no room for everybody's permuted weights."""


def weights(arm: Arm, known: Known) -> Float[Tensor, " n_p"]:
    """The arm's weights γ = s^α, the largest 1. A score of 0 keeps weight 0 for a positive α; under
    a negative one it gets the largest finite weight. Raises LlmWsaeError if all scores are 0."""
    s = score(arm.rule, known)
    if float(s.max()) == 0:
        raise LlmWsaeError(f"the rule {arm.rule} scores every dimension 0; take more rows")
    if arm.alpha < 0:
        s = s.clamp(min=float(s[s > 0].min()))
    raised = s**arm.alpha
    return (raised / raised.max()).float()
