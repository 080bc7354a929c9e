"""The figure of a sweep."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llm_wsae.drawing import BLUE, INK, ORANGE, VERMILLION, save, tidy
from llm_wsae.theory.config import Sweep
from llm_wsae.theory.rules import PLAIN
from llm_wsae.theory.sweeps import PointSummary

_MEASURES = {
    "features_per_latent": "features a latent",
    "recovered": "share of features recovered",
    "l_gt": "L_GT, a scale for each feature",
}
_COLOURS = (VERMILLION, BLUE)
_ARMS = {"variance-a0.5": (ORANGE, "s"), "whitening": (BLUE, "o")}
_SIDE = 0.16  # by which points of different lines are moved apart


def plot_sweep(sweep: Sweep, points: Mapping[str, PointSummary], path: Path) -> None:
    """What plain recovers at every point, and how weights change L_GT; 95 % intervals."""
    lines = sweep.lines
    ticks = [
        f"{sweep.points[label].sparsity:g}" if len(lines) > 1 else label
        for label in next(iter(lines.values()))
    ]
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes = figure.subplots(1, len(_MEASURES) + len(lines))
    for axis, (measure, label) in zip(axes, _MEASURES.items(), strict=False):
        for (line, labels), colour in zip(lines.items(), _COLOURS, strict=False):
            found = [points[name].measures[PLAIN][measure] for name in labels]
            means = [one.mean for one in found]
            error = [
                [one.mean - one.interval[0] for one in found],
                [one.interval[1] - one.mean for one in found],
            ]
            style = "o-" if len(lines) > 1 else "o"
            axis.errorbar(range(len(found)), means, yerr=error, fmt=style, ms=4, capsize=2,
                          color=colour, label=line)  # fmt: skip
        axis.set_title(f"{label} (plain)", fontsize=10)
        if measure == "features_per_latent":
            axis.set_yscale("log")
        else:
            axis.set_ylim(-0.03, 1.03)
        _name_points(axis, ticks, len(lines) > 1)
    if len(lines) > 1:
        axes[0].legend(frameon=False)
    for axis, (line, labels) in zip(axes[len(_MEASURES) :], lines.items(), strict=True):
        arms = {arm: style for arm, style in _ARMS.items() if arm in sweep.arms}
        for place, (arm, (colour, marker)) in enumerate(arms.items()):
            shift = _SIDE * (place - (len(arms) - 1) / 2)
            for x, name in enumerate(labels):
                one = points[name].changes[arm]
                error = [[one.mean - one.interval[0]], [one.interval[1] - one.mean]]
                axis.errorbar(x + shift, one.mean, yerr=error, fmt=marker, ms=4, color=colour,
                              capsize=2, label=arm if x == 0 else None)  # fmt: skip
        axis.axhline(0, color=INK, lw=0.8)
        axis.set_title(f"change of L_GT in %{', ' if line else ''}{line}", fontsize=10)
        axis.legend(frameon=False, fontsize=8)
        _name_points(axis, ticks, len(lines) > 1)
    figure.suptitle(sweep.why)
    save(figure, path)


def _name_points(axis: Axes, ticks: list[str], are_sparsities: bool) -> None:
    axis.set_xticks(range(len(ticks)), ticks, fontsize=8)
    if are_sparsities:
        axis.set_xlabel("sparsity S")
    else:
        axis.tick_params(axis="x", rotation=60)
        for label in axis.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    tidy(axis)
