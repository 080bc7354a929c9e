"""The figures of a run: the profile of a site, and the fidelity of its dictionaries."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from llm_wsae.drawing import BLUE, GREY, INK, LIGHT, PALETTE, legend_beside, save, tidy
from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.loss_share import effective_dimensions, loss_share
from llm_wsae.weights.loss_weights import LossWeights


def plot_profile(
    statistics: Statistics, weights: Sequence[LossWeights], site: str, path: Path
) -> None:
    """Variance of every dimension, the weights γ, and the share of the loss that each then carries.

    The upper two panels order dimensions by falling winsorised variance. A matrix has no weight per
    dimension: a line shows by how much it stretches the principal directions, ordered alike.
    """
    robust = statistics.robust_variance
    order = robust.argsort(descending=True)
    principal = torch.linalg.eigh(statistics.robust_covariance).eigenvectors.flip(1)
    rank = torch.arange(1, statistics.d_in + 1)
    figure = Figure(figsize=(11, 9), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    top.plot(rank, statistics.variance[order], ".", ms=4, color=LIGHT, label="all rows")
    top.plot(rank, robust[order], color=INK, lw=1.5, label="winsorised")
    top.set(yscale="log", ylabel="variance")
    for number, w in enumerate(weights):
        colour = INK if w.name == "uniform" else PALETTE[number % len(PALETTE)]
        if w.is_matrix:
            stretched = (w.gamma.double() @ principal).norm(dim=0)
            label = f"{w.name}\n(principal directions)"
            middle.plot(rank, stretched, color=colour, label=label)
        else:
            middle.plot(rank, w.gamma[order], ".", ms=3, color=colour, label=w.name)
        cumulative = loss_share(w, statistics).sort(descending=True).values.cumsum(0)
        effective = effective_dimensions(w, statistics)
        label = f"{w.name}\n{effective:.1f} effective dimensions"
        bottom.plot(rank, cumulative, color=colour, lw=1.8, label=label)
    middle.set(yscale="log", ylabel="weight γ")
    bottom.set(
        xscale="log",
        ylim=(0, 1.02),
        ylabel="share of the loss carried\nby the first dimensions",
        xlabel="dimension, by falling winsorised variance (bottom panel: by falling share)",
    )
    for axis in (top, middle, bottom):
        tidy(axis)
        legend_beside(axis)
    figure.suptitle(f"{site}: {statistics.d_in} dimensions")
    save(figure, path)


def plot_fidelity(arms: Mapping[str, Mapping[str, Any]], site: str, path: Path) -> None:
    """FVU, CE recovered (with its 95 % interval) and KL of every arm, side by side.

    ``arms`` maps an arm's name to its ``fvu``, ``ce_recovered``, ``ce_recovered_interval``, ``kl``
    and ``kl_interval``.
    """
    panels = (
        ("fvu", "FVU (lower is better)", None),
        ("ce_recovered", "CE recovered (higher is better)", "ce_recovered_interval"),
        ("kl", "KL(clean ‖ spliced), nats (lower is better)", "kl_interval"),
    )
    names = list(arms)
    figure = Figure(figsize=(12, 1.6 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (key, label, interval) in zip(axes, panels, strict=True):
        for row, name in enumerate(names):
            value = arms[name][key]
            low, high = arms[name][interval] if interval else (value, value)
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            colour = INK if name.startswith("uniform") else BLUE
            axis.errorbar(value, row, xerr=error, fmt="o", color=colour, capsize=4)
            axis.annotate(
                f"{value:.3f}",
                (value, row),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=GREY,
            )
        axis.set(xlabel=label, ylim=(len(names) - 0.4, -0.7))
        axis.margins(x=0.25)
        tidy(axis, grid="x")
    axes[0].set_yticks(range(len(names)), names)
    figure.suptitle(f"{site}: what each dictionary keeps of the model, on held-out text")
    save(figure, path)
