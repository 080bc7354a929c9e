"""The profile of a site: what its dimensions look like and what each choice of weights does.

One dict for ``--json`` and one text for people, from the same numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch

from llm_wsae.statistics.moments import MASSIVE_RATIO, Statistics
from llm_wsae.weights.loss_weights import (
    LossWeights,
    collapse_warning,
    effective_dimensions,
    loss_share,
    stretching,
)

_SHOWN = 5  # dimensions listed for each choice of weights


def profile(statistics: Statistics, weights: Sequence[LossWeights]) -> dict[str, Any]:
    """Counts, spread, massive rows and, for each choice of weights, where its loss lies."""
    variance, robust = statistics.variance, statistics.robust_variance
    return {
        "rows": statistics.count,
        "dimensions": statistics.d_in,
        "constant_dimensions": (variance == 0).nonzero()[:, 0].tolist(),
        "median_norm": statistics.median_norm,
        "massive": {
            "threshold": statistics.massive_threshold,
            "rows": statistics.massive_count,
            "share": statistics.massive_share,
            "positions": [
                {"first": first, "last": last, "massive": massive, "rows": rows}
                for first, last, massive, rows in statistics.massive_positions()
            ],
        },
        "variance_max_over_median": _max_over_median(variance),
        "robust_variance_max_over_median": _max_over_median(robust),
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


_NO_FORECAST = (
    "no number here predicts what whitening gains (measured at five sites of two models); "
    "`llm-wsae run --alpha auto` tries it"
)


def profile_text(facts: dict[str, Any]) -> str:
    """The profile for people: a few lines, a table of the weights, and any warnings."""
    massive = facts["massive"]
    width = max([24, *(len(weights["name"]) + 2 for weights in facts["weights"])])
    lines = [
        f"{facts['rows']:,} rows of {facts['dimensions']} dimensions, "
        f"median norm {facts['median_norm']:.1f}",
        f"variance, largest over median dimension: {facts['variance_max_over_median']:.0f} "
        f"(winsorised: {facts['robust_variance_max_over_median']:.0f}); "
        f"median excess kurtosis {facts['excess_kurtosis_median']:.1f}",
        f"massive activations (norm > {massive['threshold']:.0f}, ~{MASSIVE_RATIO:g} medians): "
        f"{massive['rows']} rows, {massive['share']:.3%}{_where(massive['positions'])}",
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
        are, their = ("dimensions are", "their") if len(constant) > 1 else ("dimension is", "its")
        lines.append(
            f"warning: {len(constant)} {are} constant ({_first(constant)}), so there is nothing "
            f"to explain there; whitening takes {their} variance as a small number above 0"
        )
    lines += [f"warning: {w['warning']}" for w in facts["weights"] if w["warning"]]
    lines.append(_NO_FORECAST)
    return "\n".join(lines)


def _first(dimensions: list[int]) -> str:
    shown = ", ".join(map(str, dimensions[:_SHOWN]))
    return shown if len(dimensions) <= _SHOWN else f"{shown}, …"


def _where(positions: list[dict[str, int]]) -> str:
    if not positions:
        return ""
    most = sorted(positions, key=lambda p: -p["massive"])[:3]
    spans = [
        f"{p['massive']} at position{'s' * (p['first'] != p['last'])} "
        + (f"{p['first']}–{p['last']}" if p["first"] != p["last"] else f"{p['first']}")
        for p in most
    ]
    return ": " + ", ".join(spans)
