"""Where a weighted loss lies: the share of each dimension, and a warning when few dominate it."""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.loss_weights import LossWeights

COLLAPSE_SHARE = 0.1  # warn when fewer than this share of the dimensions carry the loss


def stretching(weights: LossWeights) -> Float[Tensor, " d_in"]:
    """The factors by which Γ changes lengths: γ, or the singular values of the matrix (float64)."""
    gamma = weights.gamma.double()
    return torch.linalg.svdvals(gamma) if weights.is_matrix else gamma


def loss_share(weights: LossWeights, statistics: Statistics) -> Float[Tensor, " d_in"]:
    """Share of the weighted variance that each dimension carries: γ²·var / Σ γ²·var.

    Under weights of tokens: its share of the variance of the usual rows, each times its weight. For
    a matrix: the share of each principal direction of the weighted rows, i.e. of the eigenvalues of
    ΓΣΓᵀ, the largest first.
    """
    gamma = weights.gamma.double()
    if weights.is_matrix:
        covariance = gamma @ statistics.robust_covariance @ gamma.T
        share = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    elif weights.rule.weighs_tokens:
        squares, row_weights = squares_and_weights(weights, statistics)
        share = row_weights @ squares
    else:
        share = gamma**2 * statistics.robust_variance
    return share / share.sum()


def squares_and_weights(
    weights: LossWeights, statistics: Statistics
) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, " rows"]]:
    """Squares of the usual rows, normalised as in a training, and the rows' weights of a rule that
    weighs tokens (float64)."""
    usual = statistics.usual_sample.double()
    scale = statistics.robust_variance.mean().sqrt().clamp(min=1e-300)
    rows = (usual - usual.mean(0)) / scale
    row_weights = weights.row_weights(rows, torch.ones_like(rows[:, 0]))
    assert row_weights is not None
    return rows.square(), row_weights


def effective_dimensions(weights: LossWeights, statistics: Statistics) -> float:
    """Participation ratio (Σw)²/Σw² of the shares w: how many dimensions the loss depends on.

    For a matrix, how many directions: fewer for correlated dimensions, even when Γ = 1.
    """
    return float(1 / (loss_share(weights, statistics) ** 2).sum())


def collapse_warning(weights: LossWeights, statistics: Statistics) -> str | None:
    """A sentence if fewer than a tenth of the dimensions dominate the weighted loss, else None."""
    effective, d_in = effective_dimensions(weights, statistics), statistics.d_in
    if effective >= COLLAPSE_SHARE * d_in:
        return None
    share, dimension = loss_share(weights, statistics).max(0)
    what = "one direction" if weights.is_matrix else f"dimension {int(dimension)}"
    consequence = (
        "as it is in the activations themselves, without weights"
        if weights.rule.is_plain or weights.rule.weighs_tokens
        else "so a dictionary trained with it explains those and neglects the rest"
    )
    return (
        f"{weights.name}: the loss is dominated by {effective:.1f} of {d_in} "
        f"{'directions' if weights.is_matrix else 'dimensions'} "
        f"({effective / d_in:.1%}; {what} alone carries {float(share):.0%}), {consequence}"
    )
