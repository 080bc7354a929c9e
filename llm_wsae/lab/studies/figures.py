"""The figure of a study: differences from plain dictionaries, with their intervals.

It is written as PNG, and given as numbers to the page that draws it (``pages/report.html``).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from llm_wsae.lab.studies.comparison import BETTER, WORSE, Compared
from llm_wsae.lab.studies.inference import Estimate
from llm_wsae.lab.studies.plan import PLAIN
from llm_wsae.lab.studies.results import Result
from llm_wsae.pages.drawing import BLUE, GREY, INK, PALETTE, save, tidy
from llm_wsae.statistics.measures import DRAWN, L0, STUDIED

_COLOURS = {BETTER: BLUE, WORSE: PALETTE[1]}
_LEGEND = (
    "Filled: the rule. Hollow: its control. Bars are 95 % intervals. The scale is logarithmic far "
    "from 0."
)
_FIDELITY = [measure.key for measure in DRAWN]


def plot_differences(
    compared: Sequence[Compared], measures: Sequence[str], site: str, path: Path
) -> None:
    """One panel for each measure, one row for each rule and k, its control below it in grey."""
    shown, controls = _rows(compared), _controls(compared)
    figure = Figure(figsize=(2.6 * len(measures) + 2, 2 + 0.42 * len(shown)), layout="constrained")
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axis, measure in zip(axes, measures, strict=True):
        axis.axvline(0, color=INK, lw=0.8)
        for place, one in enumerate(shown):
            control = controls.get((one.control, one.k))
            if control is not None:
                _draw(axis, control.effects.get(measure), place + 0.2, "D", GREY, "none")
            colour = _COLOURS.get(one.verdicts.get(measure, ""), INK)
            _draw(axis, one.effects.get(measure), float(place), "o", colour, colour)
        axis.set_title(_title(measure), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.15)
        tidy(axis, grid="x")
    axes[0].set_yticks(range(len(shown)), [one.name for one in shown])
    axes[0].set_ylim(len(shown) - 0.4, -0.6)
    figure.suptitle(f"{site}: differences from plain dictionaries of the same k")
    handles = [
        Line2D([], [], color=BLUE, marker="o", ls="", label="better"),
        Line2D([], [], color=_COLOURS[WORSE], marker="o", ls="", label="worse"),
        Line2D([], [], color=INK, marker="o", ls="", label="not shown"),
        Line2D([], [], color=GREY, marker="D", mfc="none", ls="", label="its control"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, path)


def figures_of_page(
    results: Sequence[Result], compared: Sequence[Compared], measures: Sequence[str]
) -> dict[str, Any]:
    """The same as numbers, JSON-able; ``pages/report.html`` says what it expects."""
    shown, controls = _rows(compared), _controls(compared)
    owners = {one.label: one.control for one in shown}
    numbers = {label: number for number, label in enumerate((PLAIN, *owners))}
    of_control = {control: numbers[label] for label, control in owners.items() if control}
    others = [measure for measure in measures if measure not in _FIDELITY]
    return {
        "series": [
            {"name": PLAIN, "group": "plain"},
            *(
                {"name": label, "control": control, "group": "weighted", "colour": n % len(PALETTE)}
                for n, (label, control) in enumerate(owners.items())
            ),
        ],
        "points": [
            {
                "series": of_control.get(r.label, numbers.get(r.label)),
                "control": r.label in of_control,
                "name": r.label,
                "k": r.k,
                "values": {"l0": r.shares["l0"], "fvu": r.fvu, "ce_recovered": r.ce_recovered}
                | {measure: value.mean for measure, value in r.values.items()},
            }
            for r in results
            if not r.is_baseline
        ],
        "measures": {m.key: m.of_page() for m in (*DRAWN, L0)}
        | {name: STUDIED[name].of_page() for name in measures},
        "curves": [
            {"title": "Fidelity", "across": "l0", "up": _FIDELITY},
            {"title": "Monosemanticity", "across": "l0", "up": others},
        ],
        "legend": _LEGEND,
        "forest": measures,
        "differences": [
            {
                "equal": "k",
                "across": "l0",
                "rows": [
                    {
                        "series": numbers[one.label],
                        "name": one.name,
                        "word": _words(one),
                        "values": _numbers(one),
                        "control": _numbers(controls.get((one.control, one.k))),
                    }
                    for one in shown
                ],
            }
        ],
    }


def _rows(compared: Sequence[Compared]) -> list[Compared]:
    """What has a row of its own: all but controls of something else."""
    controls = {one.control for one in compared}
    return [one for one in compared if one.label not in controls]


def _controls(compared: Sequence[Compared]) -> Mapping[tuple[str | None, int], Compared]:
    return {(one.label, one.k): one for one in compared}


def _title(measure: str) -> str:
    one = STUDIED[measure]
    return f"{one.title}\n(lower is better)" if one.lower_is_better else one.title


def _words(one: Compared) -> str:
    said = [f"{STUDIED[measure].title} {word}" for measure, word in one.verdicts.items()]
    return ", ".join(said)


def _numbers(one: Compared | None) -> dict[str, tuple[float, ...]]:
    effects = {} if one is None else one.effects
    return {name: (found.difference, *found.interval) for name, found in effects.items()}


def _draw(
    axis: Axes, one: Estimate | None, place: float, marker: str, colour: str, fill: str
) -> None:
    if one is None:
        return
    low, high = one.interval
    error = [[one.difference - low], [high - one.difference]]
    axis.errorbar(
        one.difference, place, xerr=error, fmt=marker, color=colour, mfc=fill, ms=5, elinewidth=1.2
    )
