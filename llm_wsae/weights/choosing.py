"""From rules to weights: γ = s^α from a rule's scores s (Cui et al. 2026), or Γ = S^α from its
matrix S, or custom weights; clipped and normalised.

Normalised means that the weighted variance equals the plain one, Σ γ²·var = Σ var or
tr ΓΣΓᵀ = tr Σ, so a dictionary that explains nothing has the same loss under any weights. The
losses of arms are then comparable, and one λ of a penalty means the same in all of them; Adam's
steps do not depend on the scale. Variances are winsorised throughout, because the loss ignores
massive rows too.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.outside import LARGEST_NUMBER, check_number
from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.loss_weights import (
    NOTHING_LEFT,
    Gamma,
    LossWeights,
    stretching,
)
from llm_wsae.weights.rules import OWN, Rule, spectrum

_LEAST_LOG = math.log(torch.finfo(torch.float32).tiny)  # less than it is 0, or nearly, in float32
MAX_CONDITION = 1e5  # of a space: beyond it the way there and back is too inexact in float32


def choose_weights(
    inputs: RuleInputs | Statistics,
    rules: Iterable[Rule | str],
    alphas: Sequence[float],
    own: LossWeights | None = None,
    config: WeightConfig = WeightConfig(),  # noqa: B008 - frozen
) -> list[LossWeights]:
    """Normalised weights of every rule and α, without repetitions, and weights from a file last.

    ``uniform`` ignores α, so it comes once. Raises as ``weights_from_rule`` and ``own_weights`` do.
    """
    chosen: dict[str, LossWeights] = {}
    for rule in map(Rule.of, rules):
        for alpha in (1.0,) if rule.is_plain else alphas:
            weights = weights_from_rule(rule, alpha, inputs, config)
            chosen.setdefault(weights.name, weights)
    if own is not None:
        weights = own_weights(own, inputs)
        chosen[weights.name] = weights
    return list(chosen.values())


def weights_from_rule(
    rule: Rule | str,
    alpha: float,
    inputs: RuleInputs | Statistics,
    config: WeightConfig = WeightConfig(),  # noqa: B008 - frozen
) -> LossWeights:
    """γ = s^α or Γ = S^α, clipped and normalised; for ``uniform``, 1 whatever the settings. α = 0
    gives the weights of ``uniform``.

    A score of 0 gives the weight 0 for α > 0, and for α < 0 that of the smallest positive score. A
    constant dimension carries no loss whatever its weight; it gets the smallest of the others.

    Raises UsageError for an unknown rule, a form that it does not have, an α that is not finite or
    so far from 0 that weights vanish, or an input that was not measured; LlmWsaeError when every
    score is 0, hardly any row differs from the others, or a space has directions of nearly no
    weight.
    """
    check_number("alpha", alpha, -LARGEST_NUMBER)
    rule, inputs = Rule.of(rule), RuleInputs.of(inputs)
    if alpha == 0 and not rule.is_plain:
        rule, alpha = Rule.parse("uniform"), 1.0
    config = rule.settings(config)
    inputs.statistics.check_varying()
    if rule.form(config) == "matrix":
        gamma = _power_of_matrix(rule.matrix(inputs, config.draw), alpha, config.clip)
    else:
        scores = rule.scores(inputs, config.draw)
        gamma = _power_of_scores(rule, scores, alpha, inputs.statistics, config.clip)
    weights = LossWeights(_normalised(gamma, inputs.statistics).float(), rule, alpha, config)
    _check_space(weights)
    return weights


def own_weights(weights: LossWeights, inputs: RuleInputs | Statistics) -> LossWeights:
    """Weights from a file, checked against the site, clipped if they are custom, and normalised.

    Raises LlmWsaeError as ``check_for`` does, and on rows of which hardly any differs, or a space
    that cannot be left again.
    """
    statistics = RuleInputs.of(inputs).statistics
    statistics.check_varying()
    weights.check_for(statistics.d_in)
    gamma = weights.gamma.double()
    if not _weighted_variance(gamma, statistics) > 0:
        raise LlmWsaeError(NOTHING_LEFT)
    if weights.rule == OWN and weights.config.clip is not None:  # a rule's are clipped already
        gamma = _own_clipped(gamma, weights.config.clip)
    checked = replace(weights, gamma=_normalised(gamma, statistics).float())
    _check_space(checked)
    return checked


def _power_of_matrix(
    matrix: Float[Tensor, "d_in d_in"], alpha: float, clip: float | None
) -> Float[Tensor, "d_in d_in"]:
    values, vectors = spectrum(matrix)
    return (vectors * _powers(values, alpha, clip)) @ vectors.T


def _power_of_scores(
    rule: Rule,
    scores: Float[Tensor, " d_in"],
    alpha: float,
    statistics: Statistics,
    clip: float | None,
) -> Float[Tensor, " d_in"]:
    varies = statistics.variance > 0
    if not bool(scores.isfinite().all()):
        raise LlmWsaeError(f"scores of the rule {rule.name!r} are NaN or infinite; measure again")
    if not bool((scores[varies] > 0).any()):
        raise LlmWsaeError(
            f"the rule {rule.name!r} scores every dimension 0, so it prefers none; take another"
        )
    raised = _powers(scores[varies], alpha, clip)
    gamma = raised.min().expand(len(scores)).clone()
    gamma[varies] = raised
    return gamma


def _powers(scores: Tensor, alpha: float, clip: float | None) -> Tensor:
    """scores^α up to a factor, clipped around their median."""
    if alpha <= 0:
        scores = scores.clamp(min=float(scores[scores > 0].min()))
    log = alpha * scores.clamp(min=0).log()  # −∞ is the weight 0
    if clip is not None:
        log = _clipped(log, clip)
    log = log - log.max()
    vanished = int((log.isfinite() & (log < _LEAST_LOG)).sum())
    if vanished:
        raise UsageError(
            f"α = {alpha:g} is so far from 0 that the weights vanish on {vanished} of {len(log)} "
            "dimensions; choose one nearer to 0, or set clip"
        )
    return log.exp()


def _clipped(log: Tensor, clip: float) -> Tensor:
    """Logarithms of weights within that factor of the median of those that are not 0."""
    middle = float(log[log.isfinite()].median())
    return log.clamp(middle - math.log(clip), middle + math.log(clip))


def _own_clipped(gamma: Gamma, clip: float) -> Gamma:
    """Custom weights, or a custom matrix's singular values, within a factor of their median."""
    if gamma.ndim == 1:
        return _clipped(gamma.log(), clip).exp()
    left, values, right = torch.linalg.svd(gamma)
    return (left * _clipped(values.log(), clip).exp()) @ right


def _normalised(gamma: Gamma, statistics: Statistics) -> Gamma:
    weighted = _weighted_variance(gamma, statistics)
    if not weighted > 0:
        raise UsageError(
            "the weights vanish on every dimension that varies; choose an α nearer to 0, or "
            "another rule"
        )
    return gamma * math.sqrt(float(statistics.robust_variance.sum()) / weighted)


def _weighted_variance(gamma: Gamma, statistics: Statistics) -> float:
    """E‖Γ(x − μ)‖² of the winsorised rows."""
    if gamma.ndim == 2:
        return float(((gamma @ statistics.robust_covariance) * gamma).sum())
    return float((gamma**2 * statistics.robust_variance).sum())


def _check_space(weights: LossWeights) -> None:
    """Raise LlmWsaeError for a space that Γ⁻¹ cannot lead back from."""
    if not weights.config.in_space:
        return
    stretch = stretching(weights)
    if not float(stretch.min()) * MAX_CONDITION > float(stretch.max()):
        way_out = "set clip" if weights.rule == OWN else "choose an α nearer to 0, or set clip"
        raise LlmWsaeError(
            f"{weights.name} stretches one direction more than {MAX_CONDITION:,.0f} times as much "
            f"as another, so it is no space to train in; {way_out}"
        )
