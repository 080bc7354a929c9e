"""The figures of a study. Drawn on bare Figures: no window system, no globals."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from llm_wsae.files import write_atomic
from llm_wsae.plots import COLOURS
from llm_wsae.studies.curve import LEAST_INCREASE
from llm_wsae.studies.inference import Estimate
from llm_wsae.studies.plan import PLAIN
from llm_wsae.studies.results import MEASURES, Result
from llm_wsae.studies.verdict import (
    AS_CONTROL,
    BETTER,
    MIXED,
    OUTSIDE,
    UNCONTROLLED,
    WORSE,
    Compared,
)

_DPI = 130
_CURVES = ("detection", "selectivity", "purity", "probe_1")
_FOREST = ("detection", "selectivity", "detection_dense", "selectivity_dense")
_OF_VERDICT = {
    BETTER: "#00798c",
    UNCONTROLLED: "#66a182",
    AS_CONTROL: "#edae49",
    MIXED: "#8d6a9f",
    WORSE: "#d1495b",
}
_GREY = "#9aa5b1"


def plot_curve(results: Sequence[Result], site: str, path: Path) -> None:
    """Measures against cross-entropy: the plain curve by seed and its mean, every dictionary.

    Filled marks are rules, hollow ones controls.
    """
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    colours = _colours(results)
    for axis, measure in zip(axes.flat, _CURVES, strict=True):
        _draw_plain(axis, [r for r in results if r.label == PLAIN], measure)
        for label, colour in colours.items():
            own = [r for r in results if r.label == label and measure in r.point.values]
            hollow = bool(own) and not own[0].is_claim
            axis.plot(
                [_lost(r) for r in own],
                [r.point.values[measure].mean for r in own],
                "D" if hollow else "o",
                color=colour,
                mfc="none" if hollow else colour,
                ms=6,
                label=label,
            )
        axis.set(xscale="log", title=MEASURES[measure].title)
        axis.invert_xaxis()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda lost, _: f"{1 - lost:.5g}"))
        axis.set_xlabel("CE recovered (logarithm of what is lost)")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{site}: at equal cross-entropy, is a dictionary above the plain curve?")
    _save(figure, path)


def plot_differences(
    compared: Sequence[Compared],
    against_itself: Mapping[int, Mapping[str, Estimate]],
    site: str,
    path: Path,
) -> None:
    """Differences from the plain curve at equal cross-entropy, with 95 % intervals."""
    rows: list[tuple[str, Mapping[str, Estimate], str, str]] = []
    for one in compared:
        note = f" ({OUTSIDE})" if not one.effects else ""
        marker = "D" if one.is_control else "o"
        rows.append((one.label + note, one.effects, _OF_VERDICT.get(one.verdict, _GREY), marker))
    for k, found in against_itself.items():
        rows.append((f"plain k {k} on the others' curve", found, "#444444", "x"))
    figure = Figure(figsize=(14, 2 + 0.4 * max(len(rows), 1)), layout="constrained")
    axes = figure.subplots(1, len(_FOREST), sharey=True)
    for axis, measure in zip(axes, _FOREST, strict=True):
        for place, (_, effects, colour, marker) in enumerate(rows):
            if measure not in effects:
                continue
            one = effects[measure]
            low, high = one.interval
            error = [[one.difference - low], [high - one.difference]]
            fill = "none" if marker == "D" else colour
            axis.errorbar(
                one.difference, place, xerr=error, fmt=marker, color=colour, mfc=fill, capsize=3
            )
        axis.axvline(0, color="#444444", lw=0.8)
        axis.set(title=MEASURES[measure].title, xlabel="difference at equal CE")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes[0].set_ylim(max(len(rows), 1) - 0.5, -0.5)
    figure.suptitle(
        f"{site}: beside the plain curve. Colour: the verdict over both measures that decide; "
        "hollow: controls; +: with dense latents"
    )
    _name_verdicts(figure, compared)
    _save(figure, path)


def _name_verdicts(figure: Figure, compared: Sequence[Compared]) -> None:
    handles = []
    for word, is_control in dict.fromkeys((one.verdict, one.is_control) for one in compared):
        colour = _OF_VERDICT.get(word, _GREY)
        mark, fill = ("D", "none") if is_control else ("o", colour)
        handles.append(Line2D([], [], marker=mark, mfc=fill, color=colour, ls="", label=word))
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False
        )


def _draw_plain(axis: Axes, plain: Sequence[Result], measure: str) -> None:
    """Thin: each seed's curve. Thick: the mean over seeds, with its k."""
    plain = [r for r in plain if measure in r.point.values]
    for seed in sorted({r.point.seed for r in plain}):
        own = sorted((r for r in plain if r.point.seed == seed), key=_lost)
        values = [r.point.values[measure].mean for r in own]
        axis.plot([_lost(r) for r in own], values, ".-", color=_GREY, lw=0.7, ms=4)
    ks = sorted({r.point.k for r in plain})
    places, means = [], []
    for k in ks:
        own = [r for r in plain if r.point.k == k]
        places.append(float(np.exp(np.mean([np.log(_lost(r)) for r in own]))))
        means.append(float(np.mean([r.point.values[measure].mean for r in own])))
    axis.plot(places, means, "-", color="#444444", lw=2, label="plain")
    for k, x, y in zip(ks, places, means, strict=True):
        axis.annotate(f"k {k}", (x, y), xytext=(4, 6), textcoords="offset points", fontsize=8)


def _lost(result: Result) -> float:
    return max(1 - result.ce_recovered, LEAST_INCREASE)


def _colours(results: Sequence[Result]) -> dict[str, str]:
    """A colour for every label but the plain one; a control has its rule's."""
    found: dict[str, str] = {}
    rules = 0
    for result in results:
        if result.label not in found and result.label != PLAIN:
            colour = COLOURS[1 + rules % (len(COLOURS) - 1)]
            rules += 1
            found[result.label] = colour
            if result.control is not None:
                found[result.control] = colour
    return found


def _save(figure: Figure, path: Path) -> None:
    write_atomic(Path(path), lambda partial: figure.savefig(partial, format="png", dpi=_DPI))
