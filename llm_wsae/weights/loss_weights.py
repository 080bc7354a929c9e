"""Loss weights: γ, one per dimension or per token, or a matrix Γ, and what they do to the loss.

γ = s^α from a rule's scores s (Cui et al. 2026) or Γ = S^α from its matrix, or a user's own, then
scaled so that the weighted variance equals the plain one, Σ γ²·var = Σ var or tr ΓΣΓᵀ = tr Σ: the
weighted loss of a dictionary that explains nothing equals the plain one. So the losses of arms can
be compared, and one λ of a penalty means the same in all of them; Adam's steps do not depend on the
scale. Variances are winsorised here and everywhere below, because the loss
leaves massive rows out too.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.files import load_tensors, save_tensors
from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.matrix_rules import spectrum
from llm_wsae.weights.rules import (
    check_rule,
    has_matrix,
    has_scores,
    is_drawn,
    matrix,
    score,
    token_scores,
    weighs_tokens,
)

OWN_RULE = "own"  # the rule's name for weights that the user brought
COLLAPSE_SHARE = 0.1  # warn when fewer than this share of the dimensions carries the loss
MAX_CONDITION = 1e5  # of a space: beyond it float32 does not survive going there and back

Gamma = Float[Tensor, " d_in"] | Float[Tensor, "d_in d_in"]


@dataclass(frozen=True)
class LossWeights:
    """Weights of the reconstruction loss ‖Γ(x − x̂)‖², Γ = diag(γ) or a full matrix."""

    gamma: Gamma
    """Weights γ or matrix Γ, float32, normalised."""
    rule: str
    """Name of the rule behind them; "own" for a user's."""
    alpha: float
    """Exponent α of γ = s^α; 1 for a user's own."""
    config: WeightConfig = dataclasses.field(default_factory=WeightConfig)
    """Where they act, and how they were made from the scores."""

    @property
    def name(self) -> str:
        """Short name of the arm, e.g. ``variance-a0.5``; a weight of all ones is ``uniform``."""
        config = self.config
        if self.rule == "uniform" or self.alpha == 0:
            return "uniform"
        parts = [self.rule.replace(":", "-")]
        if self.rule != OWN_RULE:
            if self.is_matrix and has_scores(self.rule):
                parts.append("matrix")  # the rule alone would not say so
            parts.append(f"a{self.alpha:g}")
        if config.clip is not None:
            parts.append(f"c{config.clip:g}")
        if config.anneal:
            parts.append(f"n{config.anneal:g}")
        if config.place == "space":
            parts.append("space")
        if config.draw and is_drawn(self.rule):
            parts.append(f"d{config.draw}")
        return "-".join(parts)

    def of_rows(
        self, rows: Float[Tensor, "rows d_in"], mask: Float[Tensor, " rows"]
    ) -> Float[Tensor, " rows"] | None:
        """What every normalised row counts in the loss, masked ones 0; None if all count alike.

        They do not under a rule that weighs tokens, γ_t = c·s_t^α: this is s_t^2α, and ``gamma`` is
        c for every dimension.
        """
        if not weighs_tokens(self.rule):
            return None
        scores = token_scores(self.rule, rows, mask, self.config.draw)
        return (scores ** (2 * self.alpha)).where(mask > 0, 0)

    @property
    def is_matrix(self) -> bool:
        """Whether there is a full matrix Γ."""
        return self.gamma.ndim == 2

    def save(self, path: Path, facts: dict | None = None) -> None:
        """Write a safetensors file with γ or Γ; ``facts`` (JSON) go into its header.

        Raises LlmWsaeError when the file cannot be written.
        """
        header = {"rule": self.rule, "alpha": self.alpha, **dataclasses.asdict(self.config)}
        save_tensors(path, {"gamma": self.gamma}, {"llm_wsae": json.dumps(header | (facts or {}))})

    @classmethod
    def load(cls, path: Path) -> "LossWeights":
        """Read what ``save`` wrote, or any safetensors file with one vector or matrix in it.

        Raises LlmWsaeError when the file is not that.
        """
        tensors, metadata = load_tensors(path, "weights file")
        if "gamma" not in tensors and len(tensors) != 1:
            raise LlmWsaeError(
                f"{path} holds the tensors {sorted(tensors)}; a weights file has one, 'gamma'"
            )
        gamma = tensors.get("gamma", next(iter(tensors.values())))
        square = gamma.ndim == 2 and gamma.shape[0] == gamma.shape[1]
        if not (gamma.ndim == 1 or square) or not gamma.is_floating_point():
            raise LlmWsaeError(
                f"{path}: the weights have shape {tuple(gamma.shape)} and type {gamma.dtype}; "
                "they must be one floating-point number per dimension, or a square matrix"
            )
        try:
            header = json.loads(metadata.get("llm_wsae", "{}"))
            rule, alpha = header.get("rule", OWN_RULE), float(header.get("alpha", 1.0))
            known = {field.name for field in dataclasses.fields(WeightConfig)}
            config = WeightConfig(**{key: header[key] for key in known & header.keys()})
            if rule != OWN_RULE:
                check_rule(rule)
        except (AttributeError, TypeError, ValueError, UsageError) as error:
            raise LlmWsaeError(f"{path} does not say how its weights were made: {error}") from error
        return cls(gamma.float(), rule, alpha, config)


def weights_from_rule(
    rule: str,
    alpha: float,
    known: RuleInputs | Statistics,
    config: WeightConfig = WeightConfig(),  # noqa: B008 - frozen
) -> LossWeights:
    """γ = s^α or Γ = S^α, clipped, normalised.

    A score of 0 gives the weight 0 for α > 0 and that of the smallest positive score for α < 0. A
    constant dimension carries no loss whatever its weight; it gets the smallest among the others.

    Raises UsageError for an unknown rule, a form that it does not have, or inputs that is not
    there; LlmWsaeError when every score is 0 or a space has directions of nearly no weight.
    """
    inputs = RuleInputs.of(known)
    if weighs_tokens(rule):
        return _of_tokens(rule, alpha, inputs.statistics, config)
    if takes_matrix(rule, config):
        values, vectors = spectrum(matrix(rule, inputs, config.draw))
        if alpha == 0:  # exactly, not to rounding
            gamma = torch.eye(len(values), dtype=torch.float64)
        else:
            gamma = (vectors * _powers(values, alpha, config.clip)) @ vectors.T
    else:
        gamma = _from_scores(rule, alpha, inputs, config)
    gamma = _normalise(gamma, inputs.statistics)
    weights = LossWeights(gamma.float(), rule, alpha, config)
    _check_space(weights)
    return weights


def _of_tokens(
    rule: str, alpha: float, statistics: Statistics, config: WeightConfig
) -> LossWeights:
    """One γ for all dimensions, such that the usual rows have their plain variance when weighed."""
    check_settings(rule, config)
    weights = LossWeights(torch.ones(statistics.d_in), rule, alpha, config)
    squares, counted = _usual_squares(weights, statistics)
    if not float(squares.sum()) > 0:
        raise LlmWsaeError(f"the rule {rule!r} has nothing to weigh: the rows do not vary")
    factor = squares.sum() / (counted @ squares).sum()
    return replace(weights, gamma=(weights.gamma * factor.sqrt()).float())


def _usual_squares(
    weights: LossWeights, statistics: Statistics
) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, " rows"]]:
    """Squares of the usual rows, normalised as in a training, and what weights of tokens make each
    of them count."""
    usual = statistics.usual_sample.double()
    scale = statistics.robust_variance.mean().sqrt().clamp(min=1e-300)
    rows = (usual - usual.mean(0)) / scale
    return rows.square(), weights.of_rows(rows, torch.ones_like(rows[:, 0]))


def check_settings(rule: str, config: WeightConfig) -> None:
    """Raises UsageError for settings that a rule which weighs tokens has no use for."""
    if weighs_tokens(rule) and replace(config, draw=0) != WeightConfig():
        raise UsageError(
            f"the rule {rule!r} weighs tokens, in the loss and throughout: leave place, form, clip "
            "and anneal as they are"
        )


def takes_matrix(rule: str, config: WeightConfig) -> bool:
    """Whether the rule's matrix is taken. Raises UsageError when there is no such rule."""
    if config.form != "auto":
        return config.form == "matrix"
    return has_matrix(rule) and (config.place == "space" or not has_scores(rule))


def _from_scores(rule: str, alpha: float, inputs: RuleInputs, config: WeightConfig) -> Tensor:
    s = score(rule, inputs, config.draw)
    varies = inputs.statistics.variance > 0
    if not bool((s[varies] > 0).any()):
        raise LlmWsaeError(f"the rule {rule!r} scores every dimension 0: the rows do not vary")
    gamma = _powers(s[varies], alpha, config.clip)
    weights = gamma.min().expand(len(s)).clone()
    weights[varies] = gamma
    return weights


def _powers(scores: Tensor, alpha: float, clip: float | None) -> Tensor:
    """scores^α up to a factor, for any real α without overflow, clipped around their median."""
    if alpha <= 0:
        scores = scores.clamp(min=float(scores[scores > 0].min()))
    log = alpha * scores.clamp(min=0).log()  # −∞ is the weight 0
    if clip is not None:
        middle = float(log[log.isfinite()].median())
        log = log.clamp(middle - math.log(clip), middle + math.log(clip))
    return (log - log.max()).exp()


def own_weights(weights: LossWeights, known: RuleInputs | Statistics) -> LossWeights:
    """A user's weights, checked against the site and normalised.

    Raises LlmWsaeError on another size, a negative weight in a vector, a non-finite one, all zeros,
    or a space that cannot be left again.
    """
    statistics = RuleInputs.of(known).statistics
    gamma, d_in = weights.gamma.double(), statistics.d_in
    if len(gamma) != d_in:
        raise LlmWsaeError(
            f"the weights are for {len(gamma)} dimensions, but the site has {d_in}; "
            "make them from this store with llm-wsae weigh"
        )
    if not bool(torch.isfinite(gamma).all()) or (not weights.is_matrix and bool((gamma < 0).any())):
        raise LlmWsaeError("the weights must be finite and not negative; check the weights file")
    if weighs_tokens(weights.rule):
        return _of_tokens(weights.rule, weights.alpha, statistics, weights.config)
    if not _weighted_variance(gamma, statistics) > 0:
        raise LlmWsaeError("the weights leave no dimension in the loss; at least one must be > 0")
    checked = replace(weights, gamma=_normalise(gamma, statistics).float())
    _check_space(checked)
    return checked


def _normalise(gamma: Tensor, statistics: Statistics) -> Tensor:
    weighted = _weighted_variance(gamma, statistics)
    if not weighted > 0:
        raise UsageError("α is so large that the weights vanish on every varying dimension")
    return gamma * math.sqrt(float(statistics.robust_variance.sum()) / weighted)


def _weighted_variance(gamma: Tensor, statistics: Statistics) -> float:
    """E‖Γ(x − μ)‖² of the winsorised rows."""
    if gamma.ndim == 2:
        return float(((gamma @ statistics.robust_covariance) * gamma).sum())
    return float((gamma**2 * statistics.robust_variance).sum())


def _check_space(weights: LossWeights) -> None:
    """A space is left again by Γ⁻¹."""
    if weights.config.place == "loss":
        return
    stretch = stretching(weights)
    if not float(stretch.min()) * MAX_CONDITION > float(stretch.max()):
        raise LlmWsaeError(
            f"{weights.name} stretches one direction more than {MAX_CONDITION:g} times as much as "
            "another, so it is no space to train in; lower α or set clip"
        )


def stretching(weights: LossWeights) -> Float[Tensor, " d_in"]:
    """What Γ does to lengths: γ, or the singular values of the matrix (float64)."""
    gamma = weights.gamma.double()
    return torch.linalg.svdvals(gamma) if weights.is_matrix else gamma


def loss_share(weights: LossWeights, statistics: Statistics) -> Float[Tensor, " d_in"]:
    """Share of the weighted variance that each dimension carries: γ²·var / Σ γ²·var.

    Under weights of tokens: of the variance of the usual rows, each counted by its weight. For a
    matrix: that each principal direction of the weighted rows carries, the eigenvalues of
    ΓΣΓᵀ, the largest first.
    """
    gamma = weights.gamma.double()
    if weights.is_matrix:
        covariance = gamma @ statistics.robust_covariance @ gamma.T
        share = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    elif weighs_tokens(weights.rule):
        squares, counted = _usual_squares(weights, statistics)
        share = counted @ squares
    else:
        share = gamma**2 * statistics.robust_variance
    return share / share.sum()


def effective_dimensions(weights: LossWeights, statistics: Statistics) -> float:
    """Participation ratio (Σw)²/Σw² of the shares w: on how many dimensions the loss hangs.

    Of a matrix on how many directions, which for correlated dimensions are fewer even when Γ = 1.
    """
    return float(1 / (loss_share(weights, statistics) ** 2).sum())


def collapse_warning(weights: LossWeights, statistics: Statistics) -> str | None:
    """A sentence when the weighted loss hangs on fewer than a tenth of the dimensions."""
    effective, d_in = effective_dimensions(weights, statistics), statistics.d_in
    if effective >= COLLAPSE_SHARE * d_in:
        return None
    share, dimension = loss_share(weights, statistics).max(0)
    what = "one direction" if weights.is_matrix else f"dimension {int(dimension)}"
    consequence = (
        "which is the activations' own doing, without weights"
        if weights.rule == "uniform" or weighs_tokens(weights.rule)
        else "so a dictionary trained with it explains those and neglects the rest"
    )
    return (
        f"{weights.name}: the loss hangs on {effective:.1f} of {d_in} "
        f"{'directions' if weights.is_matrix else 'dimensions'} "
        f"({effective / d_in:.1%}; {what} alone carries {float(share):.0%}), {consequence}"
    )
