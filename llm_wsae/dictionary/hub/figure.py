"""The figure of a dictionary's loss weights: γ of every dimension, and which carry the loss."""

import io
from collections.abc import Mapping

import torch
from torch import Tensor

from llm_wsae.drawing import BLUE, GREY, tidy

_DPI = 110


def weights_figure(extras: Mapping[str, Tensor], title: str) -> bytes | None:
    """A PNG from a dictionary's ``gamma`` [d_in] and ``robust_variance`` (or ``variance``) [d_in].

    Left: the weights against the variance. Right: the cumulative share of the weighted variance
    γ²·var that the dimensions carry, with the number of effective dimensions (Σw)²/Σw². None if
    these tensors are missing, γ is a matrix, or all weights are alike: a flat line says nothing.
    """
    gamma = extras.get("gamma")
    variance = extras.get("robust_variance", extras.get("variance"))
    if gamma is None or variance is None or gamma.ndim != 1 or gamma.shape != variance.shape:
        return None
    if bool((gamma == gamma[0]).all()):
        return None
    gamma, variance = gamma.double(), variance.double()
    share = (gamma**2 * variance).clamp(min=0)
    if not bool(share.sum() > 0):
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(variance, gamma, ".", ms=3, color=BLUE)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="variance of the dimension (winsorised)",
        ylabel="weight γ",
    )
    rank = torch.arange(1, len(gamma) + 1)
    for part, colour, label in (
        (variance.clamp(min=0), GREY, "without weights"),
        (share, BLUE, "with γ"),
    ):
        part = part / part.sum()
        effective = float(1 / (part**2).sum())
        cumulative = part.sort(descending=True).values.cumsum(0)
        right.plot(
            rank, cumulative, color=colour, label=f"{label}: {effective:.1f} effective dimensions"
        )
    right.set(
        xscale="log",
        ylim=(0, 1.02),
        xlabel=f"dimensions, by falling share (of {len(gamma)})",
        ylabel="share of the loss carried",
    )
    figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize="small")
    for axis in (left, right):
        tidy(axis)
    figure.suptitle(title, fontsize="medium", parse_math=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return file.getvalue()
