"""The figures of the planted experiments, drawn without pyplot and its global state."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from llm_wsae.drawing import BLUE, GREY, INK, ORANGE, VERMILLION, save, tidy
from llm_wsae.theory.comparison import VERDICTS
from llm_wsae.theory.report import SCORING, TheoryReport
from llm_wsae.theory.rules import ARMS, MATCHED, PLAIN, SHOWN

_COLOURS = dict(zip(VERDICTS, (BLUE, ORANGE, VERMILLION, GREY), strict=True))
_LINES = (INK, VERMILLION, BLUE, ORANGE)
_COLUMNS = 4


def plot_correlations(report: TheoryReport, path: Path) -> None:
    """Rank correlation of every rule with the true monosemanticity, in every experiment."""
    names = list(report.arms)
    values = np.array(
        [[report.correlations[n][r] for n in names] for r in SCORING], dtype=float
    )  # None becomes NaN
    size = (4 + 0.75 * len(names), 1.8 + 0.42 * len(SCORING))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        text = "–" if np.isnan(value) else f"{value:+.2f}"
        colour = "white" if abs(value) > 0.6 else "black"
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axis.set_yticks(range(len(SCORING)), SCORING)
    figure.suptitle("Rank correlation with the\ntrue monosemanticity of dimensions", fontsize=11)
    figure.colorbar(image, ax=axis, shrink=0.8)
    save(figure, path)


def plot_changes(report: TheoryReport, path: Path) -> None:
    """For every experiment, each arm's change of L_GT relative to plain with its interval over
    seeds, and the change with the same weights on the wrong dimensions."""
    arms, names = SHOWN, list(report.arms)
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    size = (2.6 + 3 * columns, rows * (1.2 + 0.2 * len(arms)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        for place, arm in enumerate(arms):
            one = report.arms[name][arm]
            (low, high), mean = one.change.interval, one.change.mean
            error = [[mean - low], [high - mean]]
            colour = _COLOURS[one.verdict]
            axis.errorbar(mean, place, xerr=error, fmt="o", ms=4, color=colour, capsize=2)
            for control in ARMS[arm].controls:
                if ARMS[control].control == MATCHED:
                    at = report.arms[name][control].change.mean
                    axis.plot(at, place, "x", ms=5, color=INK)
        axis.axvline(0, color=INK, lw=0.8)
        axis.set_title(f"{name} (plain {report.arms[name][PLAIN].l_gt:.3f})", fontsize=10)
        axis.set(xlabel="change of L_GT in %")
        tidy(axis, grid="x")
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    axes[0, 0].set_yticks(range(len(arms)), arms)
    for axis in axes[:, 0]:
        axis.tick_params(axis="y", labelsize=8)
    axes[0, 0].set_ylim(len(arms) - 0.5, -0.5)
    figure.suptitle(
        "Loss on the true features relative to plain (lower is better), 95 % intervals over seeds"
    )
    labels = ("better than plain and than every control", "better than plain only",
              "worse than plain", "no significant difference")  # fmt: skip
    handles = [
        Line2D([], [], marker="o", color=_COLOURS[verdict], label=label)
        for verdict, label in zip(VERDICTS, labels, strict=True)
    ]
    label = "the same weights on the wrong dimensions (a matrix: random directions)"
    handles.append(Line2D([], [], marker="x", ls="", color=INK, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(2, columns), frameon=False)
    save(figure, path)


def plot_closed_form(facts: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """What the closed form loses at each sparsity: error, shrunk and vanished features."""
    panels = {
        "relative_error": "share of the true energy lost",
        "shrunk": "share of active features that shrink",
        "vanished": "share of active features that vanish",
    }
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (key, label) in zip(axes, panels.items(), strict=True):
        for (name, one), colour in zip(facts.items(), _LINES, strict=False):
            sparsity = [point["sparsity"] for point in one["by_sparsity"]]
            values = [point[key] for point in one["by_sparsity"]]
            axis.plot(sparsity, values, "o-", ms=3, color=colour, label=name)
        axis.set(xlabel="sparsity S", ylabel=label)
        tidy(axis)
        if key == "relative_error":
            axis.set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle("What the closed form r = ReLU(W_pᵀ W_p x) loses")
    save(figure, path)
