"""The figure of the recovery report."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llm_wsae.drawing import GREY, PALETTE, save, tidy
from llm_wsae.evaluation.round_trip.report import RecoveryNumbers, RecoveryReport

_CURVES = (
    ("vanished", "firings that vanish, %", 100),
    ("shrunk", "strength that the others lose, %", 100),
    ("false", "false latents a token", 1),
)
_LATENTS = (
    ("vanished", "vanished, % of a latent's firings", 100, False),
    ("missed", "missed, % of a latent's injections", 100, False),
    ("refit", "refit: least-squares strength\nover the encoder's", 1, True),
)


def plot_recovery(report: RecoveryReport, path: Path) -> None:
    """Above, what the round trip does to thinned codes, by how many latents are kept: a curve for
    every dictionary and, dashed, for the random one beside it. Below, how the latents of each
    dictionary are spread. Raises LlmWsaeError if the file cannot be written."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    above, below = figure.subplots(2, 3)
    colours = dict(zip(report.dictionaries, PALETTE * len(report.dictionaries), strict=False))
    for axis, (key, label, scale) in zip(above, _CURVES, strict=True):
        for name, one in report.dictionaries.items():
            _curve(axis, one.random, key, scale, GREY, None, "--")
            _curve(axis, one.trained, key, scale, colours[name], name, "-")
        axis.plot([], [], "--", color=GREY, label="frozen random")
        axis.set(xlabel="latents kept on a token", ylabel=label)
        axis.set_xlim(left=0)
        tidy(axis)
    for axis, (key, label, scale, is_ratio) in zip(below, _LATENTS, strict=True):
        for name, one in report.dictionaries.items():
            _spread(axis, one.per_latent[key], scale, colours[name])
        axis.set(xlabel=label, ylabel="% of the latents, at most that", ylim=(0, 100))
        axis.set_xlim((0.5, 1.5) if is_ratio else (0, 100))
        tidy(axis)
    handles, labels = above[0].get_legend_handles_labels()
    columns = min(4, len(handles))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    sites = " and ".join(dict.fromkeys(one.site for one in report.dictionaries.values()))
    figure.suptitle(f"{sites}: what dictionaries recover of their own codes")
    save(figure, path)


def _curve(
    axis: Axes,
    numbers: RecoveryNumbers,
    key: str,
    scale: int,
    colour: str,
    label: str | None,
    style: str,
) -> None:
    across = [point.active for point in numbers.curve]
    up = [scale * getattr(point, key) for point in numbers.curve]
    axis.plot(across, up, style, marker="o", ms=4, color=colour, label=label)


def _spread(axis: Axes, values: list[float | None], scale: int, colour: str) -> None:
    there = np.sort([scale * value for value in values if value is not None])
    if len(there):
        share = 100 * np.arange(1, len(there) + 1) / len(there)
        axis.step(there, share, where="post", color=colour, lw=1.8)
