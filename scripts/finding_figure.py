"""The figure that shows the main finding at a glance: what a few kinds of weights change."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from study_claims import ANNEALED, ANNEALING, CONFIRMATION, FOLDER, FOUND, JUMPRELU, K, Study

from llm_wsae.drawing import BLUE, INK, ORANGE, save, tidy
from llm_wsae.model.site import Site

_ROWS = (
    ("the paper's rule: variance, α = ½", "variance-a0.5", FOLDER),
    ("its mild inverse: variance, α = −¼", "variance-a-0.25", FOLDER),
    ("random weights", "random-a0.5", FOLDER),
    ("sensitivity space, α = ¼ *", FOUND, CONFIRMATION.folder),
    ("the same, JumpReLU *", FOUND, JUMPRELU.folder),
    ("participation, annealed *", ANNEALED, ANNEALING.folder),
)
_PANELS = {
    "ce": "cross-entropy recovered,\npoints, at the same k",
    "detection": "detection of latents,\nat equal cross-entropy",
    "selectivity": "selectivity for concepts,\nat equal cross-entropy",
}
_MARKS = (("o", BLUE, -0.13), ("s", ORANGE, 0.13))  # of the sites


def plot_finding(sites: Sequence[str], path: Path) -> None:
    """Difference from plain dictionaries at each site, with its 95 % interval."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, len(_PANELS), sharey=True)
    for axis, (panel, title) in zip(axes, _PANELS.items(), strict=True):
        axis.axvline(0, color=INK, lw=1)
        for row, (_, label, folder) in enumerate(_ROWS):
            studies = Study.read_all(folder)
            for site, (marker, colour, shift) in zip(sites, _MARKS, strict=True):
                value, low, high = _difference(studies, site, label, panel)
                error = [[value - low], [high - value]]
                style = {"fmt": marker, "color": colour, "ms": 6, "elinewidth": 1.6}
                axis.errorbar(value, row + shift, xerr=error, **style)
        axis.set_title(title, fontsize=11)
        axis.tick_params(axis="y", length=0)
        axis.margins(x=0.08)
        tidy(axis, grid="x")
    axes[0].set_yticks(range(len(_ROWS)), [name for name, *_ in _ROWS])
    axes[0].set_ylim(len(_ROWS) - 0.5, -0.5)
    figure.suptitle(
        "Do weights help? Differences from plain dictionaries (right of 0: better), 95 % intervals"
    )
    handles = [
        Line2D([], [], marker=marker, color=colour, ls="", label=f"block {Site.parse(site).block}")
        for site, (marker, colour, _) in zip(sites, _MARKS, strict=True)
    ]
    handles.append(Line2D([], [], ls="", label="* expectation written down before training"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def _difference(
    studies: Mapping[str, Study], site: str, label: str, panel: str
) -> tuple[float, float, float]:
    """The difference and the ends of its interval, which cross-entropy has none of."""
    study = studies[site]
    one = study.compared(label)
    if panel == "ce":
        change = 100 * one.ce_change[K]
        return change, change, change
    effect = one.effects[panel]
    return effect.difference, *effect.interval
