"""What ``recover`` found: one JSON object, and one table for people."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_wsae.evaluation.round_trip.measuring import CurvePoint, RoundTrip
from llm_wsae.files import write_json
from llm_wsae.pages.latent_measures import RECOVER
from llm_wsae.provenance import plain, versions
from llm_wsae.terminal import aligned

FIGURE = "recovery.png"
COLUMNS = {
    "L0": "mean number of active latents per token",
    "vanished %": "firings that are gone after the codes are decoded and encoded again",
    "shrunk %": "strength that the other firings lose on that way (below 0: they grow)",
    "false": "latents per token that appear on that way",
    "missed %": "a latent's direction is added, as strongly as it fires, to tokens where it is "
    "silent: how often it stays silent, median over latents",
    "answer": "slope of its activation over the added strength where it answers, median over "
    "latents (1: all of it)",
    "refit": "strengths that reconstruct the token best over those of the encoder (above 1: the "
    "encoder shrinks)",
    "gap": "error of the round trip in the dimensions less that in the latents, over the energy of "
    "the codes (theorem 4; below 0: the loss on the dimensions does not see it)",
}
_DIGITS = 6


@dataclass(frozen=True)
class RecoveryNumbers:
    """One dictionary's round trip in numbers."""

    rows: int
    """Rows measured, without massive ones."""
    l0: float
    vanished: float
    """Of all firings, the share with r = 0."""
    shrunk: float
    """Mean of (z − r)/z over the firings with r > 0."""
    false: float
    """Latents per row with r > 0 and z = 0."""
    mostly_vanished: float
    """Of the latents that fire, the share that vanishes on at least half of its firings."""
    missed: float
    """Median over latents of the share of injections that they stay silent on."""
    answer: float
    """Median over latents of the slope of activation over injected strength."""
    refit: float
    """Σ refit·z / Σ z² over all firings."""
    energy: float
    """E‖z‖²."""
    observed_loss: float
    """E‖W_decᵀ(z − r)‖² / E‖z‖²."""
    latent_loss: float
    """E‖z − r‖² / E‖z‖²."""
    gap: float
    """``observed_loss`` − ``latent_loss``."""
    curve: list[CurvePoint]

    @classmethod
    def of(cls, found: RoundTrip) -> "RecoveryNumbers":
        """The numbers of what was measured."""
        sums = found.sums
        return cls(
            rows=sums.rows,
            l0=sums.l0,
            vanished=sums.vanished_share,
            shrunk=sums.mean_shrunk,
            false=sums.false_per_row,
            mostly_vanished=sums.mostly_vanished,
            missed=_median(found.injection.missed),
            answer=_median(found.injection.answer),
            refit=found.refit_share,
            energy=found.energy,
            observed_loss=found.observed_loss,
            latent_loss=found.latent_loss,
            gap=found.gap,
            curve=found.curve,
        )

    def cells(self) -> list[str]:
        """The numbers of the table."""
        return [
            f"{self.l0:.1f}",
            f"{100 * self.vanished:.1f}",
            f"{100 * self.shrunk:+.1f}",
            f"{self.false:.2f}",
            f"{100 * self.missed:.1f}",
            f"{self.answer:.2f}",
            f"{self.refit:.3f}",
            f"{self.gap:+.4f}",
        ]


@dataclass(frozen=True)
class Recovered:
    """One dictionary, and the frozen random one beside it."""

    site: str
    sha256: str
    """Digest of the decoder, by which a page knows that the report is about its dictionary."""
    trained: RecoveryNumbers
    random: RecoveryNumbers
    per_latent: dict[str, list[Any]] = field(repr=False)
    """By latent, null where there is nothing to measure: ``firings``, ``strength`` (median),
    ``vanished``, ``shrunk``, ``false``, ``injections`` (rows), ``missed``, ``answer``, ``refit``,
    and ``takers``: up to three pairs of a latent and the share of the strength that it takes."""


@dataclass(frozen=True)
class RecoveryReport:
    """The recovery report of several dictionaries."""

    config: dict[str, Any]
    """The resolved ``RecoverConfig``."""
    store: dict[str, Any]
    """Where the rows come from: folder, and what identifies the rows of each site."""
    dictionaries: dict[str, Recovered]
    notes: list[str] = field(default_factory=list)
    """What a reader should know before relying on the numbers."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; a number that does not exist is null. Points of curves are objects."""
        facts: dict[str, Any] = plain(self)
        for name, one in self.dictionaries.items():
            for kind in ("trained", "random"):
                curve = getattr(one, kind).curve
                facts["dictionaries"][name][kind]["curve"] = [plain(p._asdict()) for p in curve]
        return facts

    def write(self, path: Path) -> None:
        """Write the JSON report. Raises LlmWsaeError if that is impossible."""
        write_json(path, {"command": RECOVER, "versions": versions(), **self.to_dict()})

    def table(self) -> str:
        """A table for people, with the meaning of each column below it."""
        rows = [["dictionary", *COLUMNS]]
        for name, one in self.dictionaries.items():
            rows += [[name, *one.trained.cells()], ["  frozen random", *one.random.cells()]]
        width = max(map(len, COLUMNS))
        lines = [aligned(rows), ""]
        lines += [f"{name.ljust(width)}  {meaning}" for name, meaning in COLUMNS.items()]
        lines += ["", *(f"note: {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines)


def per_latent(found: RoundTrip) -> dict[str, list[Any]]:
    """The columns of ``Recovered.per_latent``."""
    sums, injection = found.sums, found.injection
    pairs = zip(found.takers.tolist(), _listed(found.taken), strict=True)
    return {
        "firings": sums.fires.tolist(),
        "strength": _listed(found.strength),
        "vanished": _listed(sums.vanished),
        "shrunk": _listed(sums.shrunk),
        "false": _listed(sums.false),
        "injections": injection.rows.tolist(),
        "missed": _listed(injection.missed),
        "answer": _listed(injection.answer),
        "refit": _listed(found.refit),
        "takers": [
            [[i, share] for i, share in zip(latents, shares, strict=True) if i >= 0]
            for latents, shares in pairs
        ],
    }


def _median(values: Tensor) -> float:
    there = values[~values.isnan()]
    return float(there.median()) if len(there) else math.nan


def _listed(values: Tensor) -> Any:
    """As JSON, with six digits: more would be noise, and make the file twice as large."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(one) for one in value]
        return None if math.isnan(value) else float(f"{value:.{_DIGITS}g}")

    return short(values.tolist())
