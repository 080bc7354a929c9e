"""The figures of a run. Drawn on a bare Figure, so that no window system or global state is met."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from llm_wsae.files import write_atomic
from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.loss_share import effective_dimensions, loss_share, stretching
from llm_wsae.weights.loss_weights import LossWeights

COLOURS = ("#444444", "#d1495b", "#00798c", "#edae49", "#66a182", "#8d6a9f", "#2e4057", "#b56576")
_DPI = 130


def plot_profile(
    statistics: Statistics, weights: Sequence[LossWeights], site: str, path: Path
) -> None:
    """Variance of every dimension, the weights γ, and the share of the loss that each then carries.

    Dimensions are ordered by winsorised variance in the first two. A matrix has no weight for each
    dimension: its singular values are drawn as a line, the largest first.
    """
    robust = statistics.robust_variance
    order = robust.argsort(descending=True)
    rank = torch.arange(1, statistics.d_in + 1)
    figure = Figure(figsize=(9, 9), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    top.plot(rank, statistics.variance[order], ".", ms=3, color="#9aa5b1", label="all rows")
    top.plot(rank, robust[order], color="#444444", lw=1.5, label="winsorised")
    top.set(yscale="log", ylabel="variance", title=f"{site}: {statistics.d_in} dimensions")
    top.legend(frameon=False)
    for colour, w in zip(_cycle(len(weights)), weights, strict=True):
        effective = effective_dimensions(w, statistics)
        if w.is_matrix:
            middle.plot(rank, stretching(w), color=colour, label=f"{w.name} (singular values)")
        else:
            middle.plot(rank, w.gamma[order], ".", ms=3, color=colour, label=w.name)
        cumulative = loss_share(w, statistics).sort(descending=True).values.cumsum(0)
        bottom.plot(
            rank, cumulative, color=colour, label=f"{w.name}: {effective:.1f} effective dimensions"
        )
    middle.set(yscale="log", ylabel="weight γ")
    middle.legend(frameon=False, markerscale=3)
    bottom.set(
        xscale="log",
        ylim=(0, 1.02),
        ylabel="share of the loss carried\nby the first dimensions",
        xlabel="dimension, by falling winsorised variance (bottom: by falling share)",
    )
    bottom.legend(frameon=False, loc="center left")
    _save(figure, path)


def plot_fidelity(arms: Mapping[str, Mapping[str, Any]], site: str, path: Path) -> None:
    """FVU, CE recovered (with its 95 % interval) and KL of every arm, side by side.

    ``arms`` maps an arm's name to its ``fvu``, ``ce_recovered``, ``ce_recovered_interval``, ``kl``
    and ``kl_interval``.
    """
    panels = (
        ("fvu", "FVU (lower is better)", None),
        ("ce_recovered", "CE recovered (higher is better)", "ce_recovered_interval"),
        ("kl", "KL clean‖spliced, nats (lower is better)", "kl_interval"),
    )
    names = list(arms)
    figure = Figure(figsize=(12, 1.4 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (key, label, interval) in zip(axes, panels, strict=True):
        for row, (name, colour) in enumerate(zip(names, _cycle(len(names)), strict=True)):
            value = arms[name][key]
            low, high = arms[name][interval] if interval else (value, value)
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axis.errorbar(value, row, xerr=error, fmt="o", color=colour, capsize=4)
            axis.annotate(
                f"{value:.3f}", (value, row), xytext=(0, 8), textcoords="offset points", ha="center"
            )
        axis.set(xlabel=label, ylim=(len(names) - 0.4, -0.7))
        axis.margins(x=0.25)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    figure.suptitle(f"{site}: what each dictionary keeps of the model, on held-out text")
    _save(figure, path)


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _save(figure: Figure, path: Path) -> None:
    write_atomic(Path(path), lambda partial: figure.savefig(partial, format="png", dpi=_DPI))
