"""What a run draws of a site: the profile of its dimensions, and the page of its dictionaries."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llm_wsae.artifact.files import write_atomic, write_text
from llm_wsae.artifact.provenance import command_line
from llm_wsae.evaluation.fidelity.report import Report
from llm_wsae.pages.frame import COLOURS, filled
from llm_wsae.statistics.measures import DRAWN, L0
from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.arm import ArmConfig
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.profile import effective_dimensions, loss_share

# Okabe & Ito (2008), without its yellow, which is too light for marks on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLUE = PALETTE[0]
INK, GREY, LIGHT = "#333333", "#80868f", "#c6cad0"
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
    Dimensions are ordered by falling winsorised variance, shares by falling share. Of a matrix, a
    line shows by how much it stretches the principal directions, ordered alike."""
    robust = statistics.robust_variance
    order = robust.argsort(descending=True)
    principal = torch.linalg.eigh(statistics.robust_covariance).eigenvectors.flip(1)
    rank = torch.arange(1, statistics.d_in + 1)
    figure = Figure(figsize=(11, 9 + 0.5 * max(0, len(weights) - 6)), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    top.plot(rank, statistics.variance[order], ".", ms=4, color=LIGHT, label="all rows")
    top.plot(rank, robust[order], color=INK, lw=1.5, label="winsorised")
    colours = itertools.cycle(PALETTE[1:])
    for w in weights:
        colour = INK if w.name == "uniform" else next(colours)
        if w.is_matrix:
            stretched = (w.gamma.double() @ principal).norm(dim=0)
            label = f"{w.name}\n(principal directions)"
            middle.plot(rank, stretched, color=colour, label=label)
        else:
            middle.plot(rank, w.gamma[order], ".", ms=3, color=colour, label=w.name)
        cumulative = loss_share(w, statistics).sort(descending=True).values.cumsum(0)
        label = f"{w.name}\n{effective_dimensions(w, statistics):.1f} effective dimensions"
        bottom.plot(rank, cumulative, color=colour, lw=1.8, label=label)
    top.set(yscale="log", ylabel="variance")
    middle.set(yscale="log", ylabel="weight γ")
    share = "share of the loss carried\nby the first dimensions"
    bottom.set(xscale="log", ylim=(0, 1.02), ylabel=share)
    bottom.set_xlabel(
        "dimension, by falling winsorised variance (share of the loss: by falling share)"
    )
    for axis in (top, middle, bottom):
        tidy(axis)
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    figure.suptitle(f"{site}: {statistics.d_in} dimensions")
    write_atomic(path, lambda partial: figure.savefig(partial, format="png", dpi=130))


def write_page(
    report: Report,
    arms: Sequence[ArmConfig],
    site: str,
    path: Path,
    text: str = "",
    page: str | None = None,
) -> None:
    """The fidelity of a site's arms as ``pages/report.html``. ``text`` is the corpus, ``page`` the
    address of the page that shows the latents."""
    measures = (*DRAWN, L0)
    groups = {}
    for arm in sorted(arms, key=lambda arm: not arm.weights.rule.is_plain):
        group = "plain" if arm.weights.rule.is_plain else "weighted"
        groups[_series_of(arm)] = "half-random" if arm.kind.is_baseline else group
    colours = [None, *(number % COLOURS for number in range(len(groups) - 1))]
    of_arm = {arm.name: list(groups).index(_series_of(arm)) for arm in arms}
    points = [
        {
            "series": of_arm[arm.name],
            "control": False,
            "name": arm.name,
            "k": arm.level,
            "level": f"{'k' if arm.kind.setting == 'k' else 'L1'} = {arm.level:g}",
            "values": {m.key: getattr(report.dictionaries[arm.name], m.key) for m in measures},
        }
        for arm in arms
    ]
    rows, evidence = _from_plain(report, of_arm)
    facts = {
        "model": report.model["name"],
        "text": text,
        "dictionaries": f"{len(arms)}",
        "command": command_line(),
    }
    about = {
        "title": f"Dictionaries of {site}",
        "words": [*report.answers, _NO_VERDICT],
        "facts": [(name, value) for name, value in facts.items() if value],
        "page": page,
        "series": [
            {"name": name, "group": group, "colour": colour}
            for (name, group), colour in zip(groups.items(), colours, strict=True)
        ],
        "points": points,
        "measures": {m.key: m.of_page() for m in measures},
        "curves": [{"title": "Fidelity", "across": "l0", "up": [m.key for m in DRAWN]}],
        "legend": _LEGEND,
        "forest": ["kl", "ce_recovered", "fvu"],
        "differences": [{"equal": "k", "across": "l0", "rows": rows}] if rows else [],
        "evidence": evidence,
        "tables": [report.measured.of_page()],
    }
    write_text(path, filled("report.html", about))


def _from_plain(
    report: Report, series: Mapping[str, int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Differences from the plain dictionaries, as the page draws them, and in words."""
    rows, evidence = [], []
    for name, one in report.from_plain.items():
        word = "KL level with plain" if one.word == "level" else f"{one.word} KL"
        values = {
            "kl": (one.kl, *one.kl_interval),
            "ce_recovered": (one.ce_recovered, *one.ce_recovered_interval),
            "fvu": (one.fvu,),
        }
        rows.append({"series": series[name], "name": name, "word": word, "values": values})
        ce, kl = (f"[{a:+.4f}, {b:+.4f}]" for a, b in (one.ce_recovered_interval, one.kl_interval))
        text = (
            f"{word}: {one.kl:+.4f} {kl} nats compared with {one.plain}; CE recovered "
            f"{one.ce_recovered:+.4f} {ce}; FVU {one.fvu:+.4f}"
        )
        evidence.append({"series": series[name], "name": name, "text": text})
    return rows, evidence


def _series_of(arm: ArmConfig) -> str:
    """The weights of an arm, and its architecture if it is not TopK's: what its k-curve is of."""
    kind = "" if arm.architecture == "topk" else f", {arm.architecture}"
    return f"{arm.weights.name}{kind}"


def tidy(axis: Axes) -> None:
    """A light grid behind the data, and no frame at the top and on the right."""
    axis.grid(color=LIGHT, alpha=0.5, lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
