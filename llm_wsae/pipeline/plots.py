"""The figures of a run: the profile of a site, the fidelity of its dictionaries, and their page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llm_wsae.artifact.files import write_atomic, write_text
from llm_wsae.evaluation.fidelity.report import FromPlain, Report
from llm_wsae.pages.frame import COLOURS, filled
from llm_wsae.statistics.measures import DRAWN, L0
from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.arm import ArmConfig
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.profile import effective_dimensions, loss_share

# Okabe & Ito (2008), without its yellow, which is too light for marks on white
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)
INK, GREY, LIGHT = "#333333", "#80868f", "#c6cad0"
_DPI = 130
_TOGETHER = len(PALETTE) - 1  # weights in one panel, beside the plain ones
_NO_VERDICT = (
    "Intervals are 95 %, over the documents of the held-out text: they do not say what another "
    "seed would change. A verdict on weights needs seeds and controls: llm-wsae study."
)
_LEGEND = (
    "A weighted dictionary less the plain one of the same k and seed, on the same documents. Bars "
    "are 95 % intervals, which FVU has none of; the scale is logarithmic far from 0."
)


def plot_profile(
    statistics: Statistics, weights: Sequence[LossWeights], site: str, path: Path
) -> None:
    """Variance of every dimension, the weights γ, and the share of the loss that each then carries.

    Dimensions are ordered by falling winsorised variance, shares by falling share. A matrix has no
    weight per dimension: a line shows by how much it stretches the principal directions, ordered
    alike. More than a few weights are shown in several pairs of panels, the plain ones in each.
    """
    robust = statistics.robust_variance
    order = robust.argsort(descending=True)
    principal = torch.linalg.eigh(statistics.robust_covariance).eigenvectors.flip(1)
    rank = torch.arange(1, statistics.d_in + 1)
    plain = [w for w in weights if w.name == "uniform"]
    others = [w for w in weights if w.name != "uniform"]
    groups = [others[i : i + _TOGETHER] for i in range(0, max(len(others), 1), _TOGETHER)]
    num_panels = 1 + 2 * len(groups)
    figure = Figure(figsize=(11, 3 * num_panels), layout="constrained")
    top, *pairs = figure.subplots(num_panels, 1, sharex=True)
    top.plot(rank, statistics.variance[order], ".", ms=4, color=LIGHT, label="all rows")
    top.plot(rank, robust[order], color=INK, lw=1.5, label="winsorised")
    top.set(yscale="log", ylabel="variance")
    for middle, bottom, group in zip(pairs[::2], pairs[1::2], groups, strict=True):
        for w, colour in zip([*plain, *group], [INK] * len(plain) + [*PALETTE[1:]], strict=False):
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
        share = "share of the loss carried\nby the first dimensions"
        bottom.set(xscale="log", ylim=(0, 1.02), ylabel=share)
    pairs[-1].set_xlabel(
        "dimension, by falling winsorised variance (share of the loss: by falling share)"
    )
    for axis in (top, *pairs):
        tidy(axis)
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    figure.suptitle(f"{site}: {statistics.d_in} dimensions")
    _save(figure, path)


def plot_fidelity(arms: Mapping[str, Mapping[str, Any]], site: str, path: Path) -> None:
    """FVU, CE recovered (with its 95 % interval) and KL of every arm, side by side, half-random
    ones in grey. ``arms`` maps an arm's name to its numbers; what is None is not drawn."""
    names = list(arms)
    figure = Figure(figsize=(12, 1.6 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(DRAWN), sharey=True)
    for axis, measure in zip(axes, DRAWN, strict=True):
        for row, name in enumerate(names):
            value = arms[name][measure.key]
            if value is None:
                continue
            ends = arms[name].get(f"{measure.key}_interval", (value, value))
            low, high = (value if end is None else end for end in ends)
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            colour = INK if name.startswith("uniform") else BLUE
            colour = GREY if "-frozen-" in name else colour
            axis.errorbar(value, row, xerr=error, fmt="o", color=colour, capsize=4)
            above = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
            axis.annotate(f"{value:.3f}", (value, row), fontsize=9, color=GREY, **above)
        better = "lower" if measure.lower_is_better else "higher"
        axis.set(xlabel=f"{measure.title} ({better} is better)", ylim=(len(names) - 0.4, -0.7))
        axis.margins(x=0.25)
        tidy(axis, grid="x")
    axes[0].set_yticks(range(len(names)), names)
    figure.suptitle(f"{site}: what each dictionary keeps of the model, on held-out text")
    _save(figure, path)


def write_page(report: Report, arms: Sequence[ArmConfig], site: str, path: Path) -> None:
    """The fidelity of a site's arms as ``pages/report.html``."""
    plain_first = sorted(arms, key=lambda arm: not arm.weights.rule.is_plain)
    found = {_series_of(arm): _group_of(arm) for arm in plain_first}
    colours = [None, *(number % COLOURS for number in range(len(found) - 1))]
    series = [
        {"name": name, "group": group, "colour": colour}
        for (name, group), colour in zip(found.items(), colours, strict=True)
    ]
    of_arm = {arm.name: list(found).index(_series_of(arm)) for arm in arms}
    rows = [
        {
            "series": of_arm[name],
            "name": name,
            "word": _word(one),
            "values": {
                "kl": (one.kl, *one.kl_interval),
                "ce_recovered": (one.ce_recovered, *one.ce_recovered_interval),
                "fvu": (one.fvu,),
            },
        }
        for name, one in report.from_plain.items()
    ]
    about = {
        "title": f"Dictionaries of {site}",
        "words": [_NO_VERDICT],
        "facts": [("model", report.model["name"]), ("dictionaries", f"{len(arms)}")],
        "series": series,
        "points": [
            {
                "series": of_arm[arm.name],
                "control": False,
                "name": arm.name,
                "k": arm.level,
                "level": f"{'k' if arm.kind.setting == 'k' else 'L1'} = {arm.level:g}",
                "values": {
                    m.key: getattr(report.dictionaries[arm.name], m.key) for m in (*DRAWN, L0)
                },
            }
            for arm in arms
        ],
        "measures": {m.key: m.of_page() for m in (*DRAWN, L0)},
        "curves": [{"title": "Fidelity", "across": "l0", "up": [m.key for m in DRAWN]}],
        "legend": _LEGEND,
        "forest": ["kl", "ce_recovered", "fvu"],
        "differences": [{"equal": "k", "across": "l0", "rows": rows}] if rows else [],
        "evidence": [
            {"series": of_arm[name], "name": name, "text": _sentence(one)}
            for name, one in report.from_plain.items()
        ],
        "tables": [report.measured.of_page()],
    }
    write_text(path, filled("report.html", about))


def _series_of(arm: ArmConfig) -> str:
    """The weights of an arm, and its architecture if it is not TopK's: what its k-curve is of."""
    kind = "" if arm.architecture == "topk" else f", {arm.architecture}"
    return f"{arm.weights.name}{kind}"


def _group_of(arm: ArmConfig) -> str:
    if arm.kind.is_baseline:
        return "half-random"
    return "plain" if arm.weights.rule.is_plain else "weighted"


def _word(one: FromPlain) -> str:
    low, high = one.kl_interval
    return "higher KL" if low > 0 else "lower KL" if high < 0 else "KL level with plain"


def _sentence(one: FromPlain) -> str:
    ce, kl = (
        f"[{low:+.4f}, {high:+.4f}]" for low, high in (one.ce_recovered_interval, one.kl_interval)
    )
    return (
        f"{_word(one)}: {one.kl:+.4f} {kl} nats compared with {one.plain}; CE recovered "
        f"{one.ce_recovered:+.4f} {ce}; FVU {one.fvu:+.4f}"
    )


def tidy(axis: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """A light grid behind the data, and no frame at the top and on the right."""
    axis.grid(axis=grid, color=LIGHT, alpha=0.5, lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    write_atomic(path, lambda partial: figure.savefig(partial, format="png", dpi=_DPI))
