"""What all figures share: colours that colour-blind readers can tell apart, and how one is saved.

Figures are drawn on bare ``Figure`` objects: no window system and no global state.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llm_wsae.artifact.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def tidy(axis: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """A light grid behind the data, and no frame at the top and on the right."""
    axis.grid(axis=grid, color=LIGHT, alpha=0.5, lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def legend_beside(axis: Axes) -> None:
    """The legend to the right of the data, not over it."""
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG. Raises LlmWsaeError if that is impossible."""
    write_atomic(Path(path), lambda partial: figure.savefig(partial, format="png", dpi=_DPI))
