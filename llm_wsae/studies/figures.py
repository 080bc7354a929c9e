"""The figures of a study: every rule beside the plain curve, and all differences in one view.

Both are written as PNG, and given as numbers to the page that draws them (``pages/report.html``).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from llm_wsae.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT,
    ORANGE,
    PALETTE,
    PURPLE,
    VERMILLION,
    save,
    tidy,
)
from llm_wsae.evaluation.fidelity.report import OF_PAGE
from llm_wsae.studies.comparison import (
    BETTER,
    CONTROL,
    MIXED,
    NO_BETTER_THAN_CONTROL,
    UNCONTROLLED,
    VERDICTS,
    WORSE,
    Compared,
)
from llm_wsae.studies.curve import LEAST_INCREASE
from llm_wsae.studies.inference import Estimate
from llm_wsae.studies.plan import PLAIN
from llm_wsae.studies.results import MEASURES, PLANTED, Result, deciding

_ALSO = ("selectivity", "detection_all", "purity")  # beside the deciding measures
_OF_PLANTS = ("planted_recovered", "planted_f1")
_COSTS = {"CE": "ce_recovered", "KL": "kl", "density": "density", "FVU": "fvu"}
_OF_VERDICT = {
    BETTER: BLUE,
    UNCONTROLLED: GREEN,
    NO_BETTER_THAN_CONTROL: ORANGE,
    MIXED: PURPLE,
    WORSE: VERMILLION,
}
_DENSITY = "latents active per token, dense ones not counted"
_CONTROL = "drawn at random, so that no verdict is passed"
_LEGEND = (
    "Filled: the rule, in the colour of its verdict. Hollow: its control. Bars are 95 % intervals. "
    "The scale is logarithmic far from 0. Rows of uniform compare a plain k with the line between "
    "its neighbours: where that is not 0, the curve is too coarse for differences of its size."
)
_CURVES = (
    "Large marks are means over seeds, small ones the seeds; controls are hollow. The line joins "
    "plain dictionaries."
)
_LINEAR_WITHIN = 0.01  # differences beyond it are drawn on a logarithmic scale
_ACROSS = 2  # rules in a row of the curve's panels
_NEAR = 0.08  # of the width of a panel, where the names of two k would touch


def plot_curve(
    results: Sequence[Result], compared: Sequence[Compared], site: str, path: Path
) -> None:
    """The deciding measures against cross-entropy, one pair of panels for each rule.

    Every panel has the plain curve, by seed and as the mean over seeds, the rule's dictionaries
    (filled) and those of its control (hollow). All panels of a measure share their axes.
    """
    shown, measures = _in_rows(compared), deciding(results)
    across = min(_ACROSS, max(len(shown), 1))
    down = max(1, -(-len(shown) // across))
    columns = across * len(measures)
    figure = Figure(figsize=(1 + 3.4 * columns, 1.5 + 2 * down), layout="constrained")
    grid = figure.subplots(down, columns, squeeze=False, sharex=True)
    plain = [r for r in results if r.label == PLAIN]
    firsts: dict[str, Axes] = {}
    for place in range(down * across):
        row, column = divmod(place, across)
        axes = grid[row, column * len(measures) : (column + 1) * len(measures)]
        if place and place >= len(shown):
            for axis in axes:
                axis.set_visible(False)
            continue
        for axis, measure in zip(axes, measures, strict=True):
            first = firsts.setdefault(measure, axis)
            if first is not axis:
                axis.sharey(first)
            _draw_plain(axis, plain, measure)
            axis.set_ylabel(_title(measure), fontsize=9)
            tidy(axis)
        if place >= len(shown):
            continue
        one = shown[place]
        colour = _OF_VERDICT.get(one.verdict, INK)
        for axis, measure in zip(axes, measures, strict=True):
            _draw_points(axis, results, one.control, measure, "D", colour, "none")
            fill = "none" if one.is_control else colour
            _draw_points(axis, results, one.label, measure, "o", colour, fill)
        axes[0].set_title(f"{one.label}: {one.verdict}", loc="left", fontsize=10, pad=14)
    _lost_axis(grid[0, 0])
    for axis in grid[0]:
        _name_ks(axis, plain)
    for axis in grid.flat:
        axis.tick_params(labelsize=8)
    for own in grid.T:
        lowest = [axis for axis in own if axis.get_visible()][-1]
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel("CE recovered", fontsize=9)
    figure.suptitle(f"{site}: is a dictionary better than the plain curve at equal cross-entropy?")
    figure.legend(
        handles=[
            Line2D([], [], color=INK, lw=1.6, label="plain, mean over seeds (on top: its k)"),
            Line2D([], [], color=LIGHT, lw=1.2, label="plain, each seed"),
            Line2D([], [], color=INK, marker="o", ls="", label="the rule, each seed"),
            Line2D([], [], color=INK, marker="D", mfc="none", ls="", label="its control"),
        ],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    save(figure, path)


def plot_differences(
    compared: Sequence[Compared],
    against_itself: Mapping[int, Mapping[str, Estimate]],
    measures: Sequence[str],
    site: str,
    path: Path,
) -> None:
    """Differences from the plain curve at equal cross-entropy, with 95 % intervals.

    One row for each rule, its control below it in grey, and its verdict on the right; the deciding
    ``measures`` come first.
    """
    controls = {one.label: one for one in compared if one.is_control}
    shown, forest = _in_rows(compared), _forest(measures)
    height = 0.42 * (len(shown) + len(against_itself))
    figure = Figure(figsize=(15, 2.2 + height), layout="constrained")
    axes = figure.subplots(1, len(forest), sharey=True)
    names = [one.label for one in shown] + [f"plain, k = {k}" for k in against_itself]
    for axis, measure in zip(axes, forest, strict=True):
        axis.axvline(0, color=INK, lw=0.8)
        for place, one in enumerate(shown):
            colour = _OF_VERDICT.get(one.verdict, INK)
            if one.control in controls:
                control = controls[one.control].effects.get(measure)
                _draw_estimate(axis, control, place + 0.2, "D", GREY, "none")
            fill = "none" if one.is_control else colour
            _draw_estimate(axis, one.effects.get(measure), place - 0.1, "o", colour, fill)
        for number, found in enumerate(against_itself.values()):
            _draw_estimate(axis, found.get(measure), float(len(shown) + number), "x", GREY, GREY)
        axis.set_xscale("symlog", linthresh=_LINEAR_WITHIN, linscale=1)
        _ticks_of_differences(axis)
        axis.set_title(_title(measure), fontsize=11)
        tidy(axis, grid="x")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(max(len(names), 1) - 0.4, -0.6)
    right = axes[-1].secondary_yaxis("right")
    words = [one.verdict for one in shown]
    right.set_yticks(range(len(words)), words)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    for label, one in zip(right.get_yticklabels(), shown, strict=True):
        label.set_color(INK if one.verdict in _OF_VERDICT else GREY)
    figure.suptitle(
        f"{site}: differences from the plain curve at equal CE, with 95 % intervals\n"
        f"(logarithmic scale beyond ±{_LINEAR_WITHIN:g})",
        fontsize=12,
    )
    handles = [
        Line2D(
            [], [], color=INK, marker="o", ls="", label="the rule, in the colour of its verdict"
        ),
        Line2D([], [], color=GREY, marker="D", mfc="none", ls="", label="its control"),
    ]
    if against_itself:
        name = "a plain dictionary against the curve of the others"
        handles.append(Line2D([], [], color=GREY, marker="x", ls="", label=name))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save(figure, path)


def figures_of_page(
    results: Sequence[Result],
    at_equal: Mapping[str, Sequence[Compared]],
    against_itself: Mapping[int, Mapping[str, Estimate]],
) -> dict[str, Any]:
    """The same two figures as numbers, JSON-able; ``pages/report.html`` says what it expects.

    ``at_equal`` are the comparisons by what is equal in them: "CE", and others.
    """
    shown = _in_rows(at_equal["CE"])
    numbers = {one.label: number for number, one in enumerate(shown, 1)} | {PLAIN: 0}
    owners = {one.control: numbers[one.label] for one in shown if one.control is not None}
    planted = any(result.planted is not None for result in results)
    decided, of_plants = deciding(results), _OF_PLANTS if planted else ()
    judged, forest = decided + of_plants, _forest(decided) + of_plants
    measures = OF_PAGE | {"density": {"title": "L0 not dense", "meaning": _DENSITY, "scale": "log"}}
    for name, one in MEASURES.items():
        measures[name] = {"title": one.title, "meaning": one.meaning, "lower": one.lower_is_better}
    for name, one in PLANTED.items() if planted else ():
        measures[name] = {"title": f"plants: {one.title}", "meaning": one.meaning}
    return {
        "series": [{"name": PLAIN, "group": "plain"}, *map(_series, shown)],
        "verdicts": VERDICTS | {CONTROL: _CONTROL},
        "points": [
            {
                "series": owners.get(r.label, numbers.get(r.label)),
                "control": r.label in owners,
                "name": r.label,
                "k": r.point.k,
                "values": {"l0": r.shares["l0"]}
                | {cost: getattr(r, cost) for cost in _COSTS.values()}
                | {m: r.point.values[m].mean for m in judged if m in r.point.values},
            }
            for r in results
            if not r.is_baseline
        ],
        "measures": measures,
        "curves": [
            {"title": "What k costs", "across": "l0", "up": ["fvu", "ce_recovered", "kl"]},
            {"title": "Better than the plain curve?", "words": _CURVES, "up": judged},
        ],
        "legend": _LEGEND,
        "forest": forest,
        "differences": [
            {
                "equal": what,
                "across": _COSTS[what],
                "rows": _forest_rows(shown, numbers, compared, forest)
                + _plain_rows(against_itself if what == "CE" else {}, forest),
            }
            for what, compared in at_equal.items()
        ],
    }


def _forest(measures: Sequence[str]) -> tuple[str, ...]:
    """The measures whose differences are shown, those that decide first."""
    return tuple(dict.fromkeys((*measures, *_ALSO)))


def _title(measure: str) -> str:
    one = MEASURES[measure]
    return f"{one.title} (lower is better)" if one.lower_is_better else one.title


def _series(one: Compared) -> dict[str, Any]:
    colour = _OF_VERDICT.get(one.verdict)
    number = None if colour is None else PALETTE.index(colour)
    return {"name": one.label, "control": one.control, "group": one.verdict, "colour": number}


def _forest_rows(
    shown: Sequence[Compared],
    numbers: Mapping[str, int],
    compared: Sequence[Compared],
    forest: Sequence[str],
) -> list[dict[str, Any]]:
    found = {one.label: one for one in compared}
    return [
        {
            "series": numbers[one.label],
            "name": one.label,
            "word": found[one.label].verdict,
            "values": _differences(found[one.label].effects, forest),
            "control": _differences(
                found[one.control].effects if one.control in found else {}, forest
            ),
        }
        for one in shown
    ]


def _plain_rows(
    against_itself: Mapping[int, Mapping[str, Estimate]], forest: Sequence[str]
) -> list[dict[str, Any]]:
    return [
        {
            "series": 0,
            "name": f"{PLAIN}, k = {k}",
            "word": "against the curve of the others",
            "values": _differences(found, forest),
        }
        for k, found in against_itself.items()
    ]


def _differences(
    effects: Mapping[str, Estimate], measures: Sequence[str]
) -> dict[str, tuple[float, ...]]:
    return {m: (effects[m].difference, *effects[m].interval) for m in measures if m in effects}


def _in_rows(compared: Sequence[Compared]) -> list[Compared]:
    """What has a row of its own: rules, and drawn weights that control none; the best first."""
    controls = {one.control for one in compared}
    shown = [one for one in compared if one.label not in controls]

    def place(one: Compared) -> float:
        effect = one.effects.get("detection")
        return np.inf if effect is None else -effect.difference

    return sorted(shown, key=place)


def _draw_points(
    axis: Axes,
    results: Sequence[Result],
    label: str | None,
    measure: str,
    marker: str,
    colour: str,
    fill: str,
) -> None:
    own = [r for r in results if r.label == label and measure in r.point.values]
    values = [r.point.values[measure].mean for r in own]
    axis.plot([_lost(r) for r in own], values, marker, color=colour, mfc=fill, ms=5)


def _draw_plain(axis: Axes, plain: Sequence[Result], measure: str) -> None:
    """Light: each seed's curve. Dark: the mean over seeds."""
    plain = [r for r in plain if measure in r.point.values]
    for seed in sorted({r.point.seed for r in plain}):
        own = sorted((r for r in plain if r.point.seed == seed), key=_lost)
        values = [r.point.values[measure].mean for r in own]
        axis.plot([_lost(r) for r in own], values, "-", color=LIGHT, lw=1)
    places = _lost_by_k(plain)
    means = [np.mean([r.point.values[measure].mean for r in plain if r.point.k == k])
             for k in places]  # fmt: skip
    axis.plot(list(places.values()), means, ".-", color=INK, lw=1.4, ms=4)


def _lost_by_k(plain: Sequence[Result]) -> dict[int, float]:
    """Means over seeds."""
    ks = sorted({r.point.k for r in plain})
    return {k: float(np.mean([_lost(r) for r in plain if r.point.k == k])) for k in ks}


def _name_ks(axis: Axes, plain: Sequence[Result]) -> None:
    """Above a panel, the k of the plain curve; those that cost nearly the same are named as one."""
    apart = _NEAR * abs(np.subtract(*np.log(axis.get_xlim())))
    groups: list[dict[int, float]] = []
    for k, place in _lost_by_k(plain).items():
        if groups and abs(np.log(place / next(reversed(groups[-1].values())))) < apart:
            groups[-1][k] = place
        else:
            groups.append({k: place})
    above = axis.get_xaxis_transform()
    for group in groups:
        name, middle = ", ".join(map(str, group)), np.exp(np.log([*group.values()]).mean())
        axis.text(middle, 1.02, name, transform=above, ha="center", fontsize=7, color=GREY)


def _draw_estimate(
    axis: Axes, one: Estimate | None, place: float, marker: str, colour: str, fill: str
) -> None:
    if one is None:
        return
    low, high = one.interval
    error = [[one.difference - low], [high - one.difference]]
    axis.errorbar(
        one.difference, place, xerr=error, fmt=marker, color=colour, mfc=fill, ms=5, elinewidth=1.2
    )


def _lost_axis(axis: Axes) -> None:
    """Cross-entropy recovered, over the logarithm of what is lost; better to the right."""
    axis.set_xscale("log")
    axis.invert_xaxis()
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda lost, _: f"{1 - lost:.4g}"))


def _ticks_of_differences(axis: Axes) -> None:
    low, high = axis.get_xlim()
    ticks = [t for t in (-1, -0.1, -0.01, 0, 0.01, 0.1, 1) if low <= t <= high]
    axis.set_xticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize=9)


def _lost(result: Result) -> float:
    return max(1 - result.ce_recovered, LEAST_INCREASE)
