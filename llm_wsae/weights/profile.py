"""What the dimensions of a site look like, and where the loss lies under each choice of weights:
one dict for ``--json``, and one text for people from it."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.statistics.moments import MASSIVE_RATIO, Statistics
from llm_wsae.weights.loss_weights import LossWeights, stretching

_SHOWN = 5  # dimensions listed for each choice of weights
_COLLAPSE_SHARE = 0.1  # warn when fewer than this share of the dimensions carry the loss


def loss_share(weights: LossWeights, statistics: Statistics) -> Float[Tensor, " d_in"]:
    """Share of the weighted variance that each dimension carries: γ²·var / Σ γ²·var.

    For a matrix: the share of each principal direction of the weighted rows, i.e. of the
    eigenvalues of ΓΣΓᵀ, the largest first.
    """
    gamma = weights.gamma.double()
    if weights.is_matrix:
        covariance = gamma @ statistics.robust_covariance @ gamma.T
        share = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    else:
        share = gamma**2 * statistics.robust_variance
    return share / share.sum()


def effective_dimensions(weights: LossWeights, statistics: Statistics) -> float:
    """Participation ratio (Σw)²/Σw² of the shares w: how many dimensions the loss depends on. For a
    matrix, how many directions: fewer for correlated dimensions, even when Γ = 1."""
    return float(1 / (loss_share(weights, statistics) ** 2).sum())


def collapse_warning(weights: LossWeights, statistics: Statistics) -> str | None:
    """A sentence if fewer than a tenth of the dimensions dominate the weighted loss, else None."""
    effective, d_in = effective_dimensions(weights, statistics), statistics.d_in
    if effective >= _COLLAPSE_SHARE * d_in:
        return None
    share, dimension = loss_share(weights, statistics).max(0)
    kind, what = "dimensions", f"dimension {int(dimension)}"
    if weights.is_matrix:
        kind, what = "directions", "one direction"
    consequence = "so a dictionary trained with it explains those and neglects the rest"
    if weights.rule.is_plain:
        consequence = "as it is in the activations themselves, without weights"
    return (
        f"{weights.name}: the loss is dominated by {effective:.1f} of {d_in} {kind} "
        f"({effective / d_in:.1%}; {what} alone carries {float(share):.0%}), {consequence}"
    )


def profile(statistics: Statistics, weights: Sequence[LossWeights]) -> dict[str, Any]:
    """Counts, spread, massive rows and, for each choice of weights, where its loss lies."""
    variance = statistics.variance
    return {
        "rows": statistics.count,
        "dimensions": statistics.d_in,
        "constant_dimensions": (variance == 0).nonzero()[:, 0].tolist(),
        "median_norm": statistics.median_norm,
        "massive": {
            "threshold": statistics.massive_threshold,
            "rows": statistics.massive_count,
            "share": statistics.massive_count / max(statistics.count, 1),
            "positions": statistics.massive_positions(),
        },
        "variance_max_over_median": _max_over_median(variance),
        "robust_variance_max_over_median": _max_over_median(statistics.robust_variance),
        "excess_kurtosis_median": float(statistics.excess_kurtosis.median()),
        "weights": [_weights_profile(w, statistics) for w in weights],
    }


def _max_over_median(values: torch.Tensor) -> float:
    return float(values.max() / values.median().clamp(min=1e-300))


def _weights_profile(weights: LossWeights, statistics: Statistics) -> dict[str, Any]:
    share, dimensions = loss_share(weights, statistics).topk(min(_SHOWN, statistics.d_in))
    stretch = stretching(weights)
    return {
        "name": weights.name,
        "rule": weights.rule.name,
        "alpha": weights.alpha,
        "form": "matrix" if weights.is_matrix else "diagonal",
        "place": weights.config.place,
        "effective_dimensions": effective_dimensions(weights, statistics),
        "gamma_min": float(stretch.min()),
        "gamma_max": float(stretch.max()),
        "largest": [
            {"direction" if weights.is_matrix else "dimension": d, "share": s}
            for d, s in zip(dimensions.tolist(), share.tolist(), strict=True)
        ],
        "warning": collapse_warning(weights, statistics),
    }


def profile_text(facts: dict[str, Any]) -> str:
    """The profile for people: a few lines, a table of the weights, and any warnings."""
    massive = facts["massive"]
    most = sorted(massive["positions"], key=lambda p: -p["massive"])[:3]
    where = ": " * bool(most) + ", ".join(map(_where, most))
    width = max([24, *(len(weights["name"]) + 2 for weights in facts["weights"])])
    lines = [
        f"{facts['rows']:,} rows of {facts['dimensions']} dimensions, "
        f"median norm {facts['median_norm']:.1f}",
        f"variance, largest over median dimension: {facts['variance_max_over_median']:.0f} "
        f"(winsorised: {facts['robust_variance_max_over_median']:.0f}); "
        f"median excess kurtosis {facts['excess_kurtosis_median']:.1f}",
        f"massive activations (norm > {massive['threshold']:.0f}, ~{MASSIVE_RATIO:g} medians): "
        f"{massive['rows']} rows, {massive['share']:.3%}{where}",
        "",
        f"{'weights':<{width}}{'effective dims':>15}{'γ from':>10}{'to':>9}   largest loss shares",
    ]
    for weights in facts["weights"]:
        shares = [(d.get("dimension"), f"{d['share']:.0%}") for d in weights["largest"]]
        largest = ", ".join(share if d is None else f"{d}: {share}" for d, share in shares)
        lines.append(
            f"{weights['name']:<{width}}{weights['effective_dimensions']:>15.1f}"
            f"{weights['gamma_min']:>10.3g}{weights['gamma_max']:>9.3g}   {largest}"
        )
    if constant := facts["constant_dimensions"]:
        shown = ", ".join(map(str, constant[:_SHOWN])) + ", …" * (len(constant) > _SHOWN)
        are, their = ("dimensions are", "their") if len(constant) > 1 else ("dimension is", "its")
        lines.append(
            f"warning: {len(constant)} {are} constant ({shown}), so there is nothing "
            f"to explain there; whitening takes {their} variance as a small number above 0"
        )
    lines += [f"warning: {w['warning']}" for w in facts["weights"] if w["warning"]]
    return "\n".join(
        [
            *lines,
            "no number here predicts what whitening gains (measured at five sites of two models); "
            "`llm-wsae run --alpha auto` tries it",
        ]
    )


def _where(position: dict[str, int]) -> str:
    first, last = position["first"], position["last"]
    where = f"position {first}" if first == last else f"positions {first}–{last}"
    return f"{position['massive']} at {where}"
