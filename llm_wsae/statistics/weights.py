"""Loss weights γ, one per dimension, and what they do to the loss.

γ = s^α from a rule's score s (Cui et al. 2026), or a user's own vector, then scaled so that
Σ γ²·var = Σ var: the weighted loss of a dictionary that explains nothing equals the plain one, so
arms share one learning rate and, under L1, one λ. ``var`` is the winsorised variance here and
everywhere below, because the loss leaves massive rows out too.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.files import load_tensors, save_tensors
from llm_wsae.statistics.moments import Statistics
from llm_wsae.statistics.monosemanticity import score

OWN_RULE = "own"  # the rule's name for a vector that the user brought
COLLAPSE_SHARE = 0.1  # warn when fewer than this share of the dimensions carries the loss


@dataclass(frozen=True)
class LossWeights:
    """Per-dimension weights of the reconstruction loss ‖Γ(x − x̂)‖², Γ = diag(γ)."""

    gamma: Float[Tensor, " d_in"]
    """Weights γ, float32, normalised."""
    rule: str
    """Name of the rule behind them; "own" for a user's vector."""
    alpha: float
    """Exponent α of γ = s^α; 1 for a user's vector."""

    @property
    def name(self) -> str:
        """Short name of the arm, e.g. ``variance-a0.5``; a weight of all ones is ``uniform``."""
        if self.rule == "uniform" or self.alpha == 0:
            return "uniform"
        return self.rule if self.rule == OWN_RULE else f"{self.rule}-a{self.alpha:g}"

    def save(self, path: Path, facts: dict | None = None) -> None:
        """Write a safetensors file with γ; ``facts`` (JSON) go into its header.

        Raises LlmWsaeError when the file cannot be written.
        """
        header = {"rule": self.rule, "alpha": self.alpha, **(facts or {})}
        save_tensors(path, {"gamma": self.gamma}, {"llm_wsae": json.dumps(header)})

    @classmethod
    def load(cls, path: Path) -> "LossWeights":
        """Read what ``save`` wrote, or any safetensors file with one vector in it.

        Raises LlmWsaeError when the file is not that.
        """
        tensors, metadata = load_tensors(path, "weights file")
        header = json.loads(metadata.get("llm_wsae", "{}"))
        if "gamma" not in tensors and len(tensors) != 1:
            raise LlmWsaeError(
                f"{path} holds the tensors {sorted(tensors)}; a weights file has one, 'gamma'"
            )
        gamma = tensors.get("gamma", next(iter(tensors.values())))
        if gamma.ndim != 1 or not gamma.is_floating_point():
            raise LlmWsaeError(
                f"{path}: the weights have shape {tuple(gamma.shape)} and type {gamma.dtype}; "
                "they must be one floating-point number per dimension"
            )
        rule, alpha = header.get("rule", OWN_RULE), float(header.get("alpha", 1.0))
        return cls(gamma.float(), rule, alpha)


def weights_from_rule(rule: str, alpha: float, statistics: Statistics) -> LossWeights:
    """γ = s^α, normalised.

    A constant dimension (variance 0) carries no loss whatever its weight; it gets the smallest
    finite weight among the others, so that a negative α cannot make it infinite.

    Raises UsageError for an unknown rule, LlmWsaeError when every score is 0.
    """
    s = score(rule, statistics)
    positive = s > 0
    if not bool(positive.any()):
        raise LlmWsaeError(f"the rule {rule!r} scores every dimension 0: the rows do not vary")
    log_s = s.clamp(min=1e-300).log()
    log_gamma = alpha * log_s
    log_gamma[~positive] = log_gamma[positive].min()
    log_gamma -= log_gamma.max()  # any real α without overflow
    return LossWeights(_normalise(log_gamma.exp(), statistics), rule, alpha)


def own_weights(weights: LossWeights, statistics: Statistics) -> LossWeights:
    """A user's vector, checked against the site and normalised.

    Raises LlmWsaeError on another length, a negative or non-finite weight, or all zeros.
    """
    gamma, d_in = weights.gamma.double(), statistics.d_in
    if len(gamma) != d_in:
        raise LlmWsaeError(
            f"the weights are for {len(gamma)} dimensions, but the site has {d_in}; "
            "make them from this store with llm-wsae weigh"
        )
    if not bool(torch.isfinite(gamma).all()) or bool((gamma < 0).any()):
        raise LlmWsaeError("the weights must be finite and not negative; check the weights file")
    if not bool((gamma**2 * statistics.robust_variance).sum() > 0):
        raise LlmWsaeError("the weights leave no dimension in the loss; at least one must be > 0")
    return LossWeights(_normalise(gamma, statistics), weights.rule, weights.alpha)


def _normalise(gamma: Tensor, statistics: Statistics) -> Tensor:
    var = statistics.robust_variance
    weighted = (gamma**2 * var).sum()
    if not bool(weighted > 0):
        raise UsageError("α is so large that the weights vanish on every varying dimension")
    return (gamma * (var.sum() / weighted).sqrt()).float()


def loss_share(weights: LossWeights, statistics: Statistics) -> Float[Tensor, " d_in"]:
    """Share of the weighted variance that each dimension carries: γ²·var / Σ γ²·var."""
    share = weights.gamma.double() ** 2 * statistics.robust_variance
    return share / share.sum()


def effective_dimensions(weights: LossWeights, statistics: Statistics) -> float:
    """Participation ratio (Σw)²/Σw² of w = γ²·var: on how many dimensions the loss hangs."""
    return float(1 / (loss_share(weights, statistics) ** 2).sum())


def collapse_warning(weights: LossWeights, statistics: Statistics) -> str | None:
    """A sentence when the weighted loss hangs on fewer than a tenth of the dimensions."""
    effective, d_in = effective_dimensions(weights, statistics), statistics.d_in
    if effective >= COLLAPSE_SHARE * d_in:
        return None
    share, dimension = loss_share(weights, statistics).max(0)
    return (
        f"{weights.name}: the loss hangs on {effective:.1f} of {d_in} dimensions "
        f"({effective / d_in:.1%}; dimension {int(dimension)} alone carries {float(share):.0%}), "
        "so a dictionary trained with it explains those and neglects the rest"
    )
