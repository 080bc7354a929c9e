"""The rules and arms of the planted experiments.

The rules are those of ``weights.rules`` that score dimensions, given what they would see of a
language model: observed rows, for some a first dictionary, for some the model itself. Three oracles
know the truth. An arm is a rule with an exponent and a way to use the weights. Each has two
controls, used in the same way: its own weights on the wrong dimensions (a matrix: the same spectrum
in random directions), and random weights. ``standardised``, a space, has the first alone.

Planted data has no language model, but it has what stands for one: the model that superposition is
a toy of (Elhage et al.
2022) reads those features. ``fisher`` is measured so.
"""

from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import LlmWsaeError
from llm_wsae.theory.optimum import least_gap_weights
from llm_wsae.theory.superposition import Planted
from llm_wsae.weights import matrix_rules, rules, scores
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.rules import Rule

RANDOM, MATCHED = CONTROLS = ("random", "matched")
"""Kinds of control; the matched one has the arm's own weights, in the wrong places."""
_OFF = 1e-4  # a feature read as less is off; in a rotated basis, rounding alone gives about 1e-7


@dataclass(frozen=True, kw_only=True)
class Known(RuleInputs):
    """What rules and oracles are given."""

    truth: Planted
    draw: int
    """Number of the controls' random draw."""


def _participation_true(known: RuleInputs) -> Float[Tensor, " n_p"]:
    """s_i = true monosemanticity of the observed dimension."""
    return cast(Known, known).truth.monosemanticity


def _gap_true(known: RuleInputs) -> Float[Tensor, " n_p"]:
    """The γ that minimise the gap of theorem 5 (Cui et al. 2026) with the true W_p."""
    return scores.gap(cast(Known, known).truth.mixing.T)


def _optimum_true(known: RuleInputs) -> Float[Tensor, "n_p n_p"]:
    """The Γ that minimises it over all matrices, with the true W_p."""
    return least_gap_weights(cast(Known, known).truth.mixing)


def _random(known: RuleInputs) -> Float[Tensor, " n_p"]:
    """Uniform on (0, 1]: a control that knows nothing of the dimensions."""
    draw = torch.Generator().manual_seed(cast(Known, known).draw)
    return 1 - torch.rand(known.statistics.d_in, generator=draw, dtype=torch.float64)


_OPTIMUM = Rule("optimum-true", matrix_fn=_optimum_true)
_ORACLES = (
    Rule("participation-true", _participation_true),
    Rule("gap-true", _gap_true),
)
RULES: dict[str, Rule] = {
    rule.base: rule
    for rule in (*rules.RULES.values(), Rule(RANDOM, _random), *_ORACLES)
    if rule.has_scores
}
"""Rules that score dimensions, then random scores and the oracles."""


def score(rule: Rule, known: Known) -> Float[Tensor, " n_p"]:
    """The score of every observed dimension (float64)."""
    return rule.scores(known, known.draw)


@dataclass(frozen=True)
class Arm:
    """A rule and how its weights are used."""

    rule: Rule
    alpha: float = 1.0
    """γ = s^α."""
    annealed: bool = False
    """Whether γ goes to 1 over the first 60 % of the steps (``Schedule.anneal``)."""
    space: bool = False
    """Whether the dictionary is trained with the plain loss in the space x' = Γx_p, which is folded
    back afterwards."""

    @property
    def name(self) -> str:
        """``kurtosis``, ``variance-a0.5``; ``ARMS`` may give it another."""
        exponent = "" if self.alpha == 1 else f"-a{self.alpha:g}"
        return f"{self.rule.name}{exponent}{'-annealed' if self.annealed else ''}"

    @property
    def is_matrix(self) -> bool:
        """Whether its weights are a matrix Γ."""
        return not self.rule.has_scores

    @property
    def control(self) -> str | None:
        """Which of the ``CONTROLS`` the arm is; None if it is none."""
        if self.rule.base == RANDOM:
            return RANDOM
        return None if self.rule.control is None else MATCHED

    @property
    def matched(self) -> "Arm":
        """The control with the same weights, used in the same way, on the wrong dimensions; a
        matrix has the same spectrum in random directions."""
        return replace(self, rule=self.rule.as_control("rotated" if self.is_matrix else "permuted"))

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of its controls; empty for a control and for the plain arm."""
        if self.control or self.rule.is_plain:
            return ()
        random = replace(self, rule=RULES[RANDOM], alpha=1.0)
        return tuple(_NAMES[arm] for arm in (random, self.matched) if arm in _NAMES)

    @property
    def needs_dictionary(self) -> bool:
        """Whether its rule needs a first dictionary."""
        return self.rule.need == "dictionary"


def _arms() -> dict[str, Arm]:
    variance = RULES["variance"]
    tried = [Arm(variance, alpha) for alpha in (-0.5, -0.25, 0.5)]
    tried += [Arm(RULES[rule]) for rule in ("variance", "kurtosis")]
    for rule in (RULES["participation"], *_ORACLES):
        tried += [Arm(rule), Arm(rule, annealed=True)]
    whitening = rules.RULES["whitening"]
    tried += [Arm(whitening), Arm(whitening, annealed=True), Arm(_OPTIMUM)]
    named = {"standardised": Arm(variance, -0.5, space=True)}
    named |= {arm.name: arm for arm in tried}
    controls = {arm.name: arm for arm in (Arm(RULES[RANDOM]), Arm(RULES[RANDOM], annealed=True))}
    for name, arm in named.items():
        controls[f"{arm.matched.rule.control}:{name}"] = arm.matched
    return {PLAIN: Arm(RULES[PLAIN_RULE])} | named | controls


PLAIN, PLAIN_RULE = "plain", "uniform"
ARMS: dict[str, Arm] = _arms()
_NAMES = {arm: name for name, arm in ARMS.items()}
SHOWN = tuple(name for name, arm in ARMS.items() if name != PLAIN and arm.control != MATCHED)
"""The arms of tables and figures without room for every arm's matched control."""


def weights(arm: Arm, known: Known) -> Float[Tensor, " n_p"] | Float[Tensor, "n_p n_p"]:
    """The arm's weights γ = s^α, scaled so that the largest is 1; of a matrix Γ = S^α, the largest
    eigenvalue. A score of 0 gives weight 0 for a positive α and the largest finite weight for a
    negative one.

    Raises LlmWsaeError if all scores are 0.
    """
    if arm.is_matrix:
        values, vectors = matrix_rules.spectrum(arm.rule.matrix(known, known.draw))
        powers = values**arm.alpha
        return ((vectors * powers / powers.max()) @ vectors.T).float()
    s = score(arm.rule, known)
    if float(s.max()) == 0:
        raise LlmWsaeError(f"the rule {arm.rule.name} scores every dimension 0; take more rows")
    if arm.alpha < 0:
        s = s.clamp(min=float(s[s > 0].min()))
    raised = s**arm.alpha
    return (raised / raised.max()).float()


def fisher(data: Planted, observed: Float[Tensor, "rows n_p"]) -> Float[Tensor, "n_p n_p"]:
    """Fisher information, at the observed rows, of a model that outputs the true features.

    It reads x̂_j = ReLU(w_jᵀx_p / ‖w_j‖²), w_j the columns of W_p, which is exact where one feature
    is active; for unit columns it is the toy model's own output. Under Gaussian noise of variance
    1 the information is E JᵀJ, J = ∂x̂/∂x_p. Float64.
    """
    w = data.mixing.double()
    read = w / w.square().sum(0)
    read_at_all = (observed.double() @ read > _OFF).double().mean(0)
    return (read * read_at_all) @ read.T
