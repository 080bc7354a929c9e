"""From units to a table: paired differences, intervals, controls, and one word for each arm.

A difference is an arm's minus the plain arm's on the same seed. The word is earned twice: against
the plain arm, Holm's correction over all arms of the experiment, and against random weights on the
same schedule, because a training stuck in a local optimum is helped by almost any disturbance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from llm_wsae.record import plain
from llm_wsae.theory.config import EXPERIMENTS, TheoryConfig
from llm_wsae.theory.rules import ARMS, PLAIN, RULES

LEVEL = 0.95
_SIGNIFICANT = 1 - LEVEL
Units = Mapping[str, Mapping[int, Mapping[str, Any]]]


@dataclass(frozen=True)
class ArmSummary:
    """One arm of one experiment against the plain arm. Differences and their 95 % intervals
    (paired t over seeds) of L_GT are in per cent of the plain arm's mean."""

    l_gt: float
    change: float
    change_interval: tuple[float, float]
    wins: int
    """Seeds on which L_GT is lower than plain."""
    p_holm: float
    """Of the paired t-test, adjusted for the arms of the experiment (Holm 1979)."""
    against_control: float | None
    """The same change against random weights on the same schedule; None for a control."""
    against_control_interval: tuple[float, float] | None
    mmcs: float
    mmcs_change: float
    recovered: float
    features_per_latent: float
    fvu: float
    verdict: str
    """better, as random (better than plain, not than random weights), worse, or –."""


@dataclass(frozen=True)
class TheoryReport:
    """All planted experiments."""

    config: TheoryConfig
    closed_form: dict[str, dict[str, Any]]
    facts: dict[str, dict[str, Any]]
    """Sizes of each experiment."""
    correlations: dict[str, dict[str, float | None]]
    """Experiment → rule → mean over seeds of Spearman's ρ with the true monosemanticity; None where
    one of the two is constant."""
    correlation_ranges: dict[str, dict[str, tuple[float, float] | None]]
    """The smallest and largest over seeds."""
    arms: dict[str, dict[str, ArmSummary]]
    """Experiment → arm."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return plain(
            {
                "config": self.config,
                "experiments": {name: EXPERIMENTS[name] for name in self.arms},
                "facts": self.facts,
                "closed_form": self.closed_form,
                "correlations": self.correlations,
                "correlation_ranges": self.correlation_ranges,
                "arms": self.arms,
            }
        )

    def table(self) -> str:
        """Three tables for people: closed form, rank correlations, change of L_GT."""
        return "\n\n".join(
            f"{title}\n\n{_align(rows)}" for title, rows in (*self._overview(), *self._notes())
        )

    def markdown(self) -> str:
        """The same tables and one for each experiment with every measure."""
        parts = ["# Planted experiments"]
        for title, rows in self._overview():
            parts += [title, _markdown(rows)]
        for name in self.arms:
            parts += [f"## {name}", self._describe(name), _markdown(self._details(name))]
        return "\n\n".join(parts) + "\n"

    def _overview(self) -> list[tuple[str, list[list[str]]]]:
        closed = [["W_p", "n", "n_p", "position holds", "max interference", "S for 5 % error"]]
        for name, one in self.closed_form.items():
            needed = one["sparsity_needed"]
            closed.append(
                [
                    name,
                    str(one["n"]),
                    str(one["n_p"]),
                    "yes" if one["assumptions_hold"] else "no",
                    f"{one['largest_interference']:.2f}",
                    "never" if needed is None else f"{needed:.3f}",
                ]
            )
        names = list(self.arms)
        rank = [["rule", *names]]
        for rule in list(RULES)[1:]:
            values = [self.correlations[name][rule] for name in names]
            rank.append([rule, *("–" if v is None else f"{v:+.2f}" for v in values)])
        change = [["arm", *names]]
        for arm in ARMS:
            if arm == PLAIN:
                change.append([arm, *(f"{self.arms[name][arm].l_gt:.3f}" for name in names)])
            else:
                change.append([arm, *(_cell(self.arms[name][arm]) for name in names)])
        seeds = self.config.seeds
        return [
            ("Closed form: is W_p in the position that theorem 1 assumes?", closed),
            ("Rank correlation of each rule with the true monosemanticity 1/PR", rank),
            (
                f"Change of L_GT against plain in %, and on how many of {seeds} seeds it is lower "
                "(first line: L_GT of plain);\n* better than plain and than random weights, "
                "~ better than plain only, ! worse than plain (Holm over arms)",
                change,
            ),
        ]

    def _notes(self) -> list[tuple[str, list[list[str]]]]:
        return [("Experiments", [["name", "why"], *([n, self._describe(n)] for n in self.arms)])]

    def _describe(self, name: str) -> str:
        e, facts = EXPERIMENTS[name], self.facts[name]
        return (
            f"{e.why}: n = {facts['n']}, S = {e.sparsity:g}, k = {facts['k']}, "
            f"learning rate {e.learning_rate:g}"
        )

    def _details(self, name: str) -> list[list[str]]:
        head = "arm|L_GT|change %|95 %|wins|vs random %|95 %|MMCS|change|recovered"
        rows = [[*head.split("|"), "features/latent", "FVU", "verdict"]]
        for arm, s in self.arms[name].items():
            rows.append(
                [
                    arm,
                    f"{s.l_gt:.3f}",
                    f"{s.change:+.1f}",
                    _interval(s.change_interval),
                    f"{s.wins}/{self.config.seeds}",
                    "" if s.against_control is None else f"{s.against_control:+.1f}",
                    _interval(s.against_control_interval),
                    f"{s.mmcs:.3f}",
                    f"{s.mmcs_change:+.3f}",
                    f"{s.recovered:.2f}",
                    f"{s.features_per_latent:.2f}",
                    f"{s.fvu:.4f}",
                    s.verdict,
                ]
            )
        return rows


def summarise(
    units: Units, closed_form: dict[str, dict[str, Any]], config: TheoryConfig
) -> TheoryReport:
    """Sum up the units of every experiment."""
    correlations, ranges = {}, {}
    for name, seeds in units.items():
        found = {r: [u["correlations"][r] for u in seeds.values()] for r in RULES}
        known = {r: [v for v in values if v is not None] for r, values in found.items()}
        correlations[name] = {r: float(np.mean(v)) if v else None for r, v in known.items()}
        ranges[name] = {r: (min(v), max(v)) if v else None for r, v in known.items()}
    return TheoryReport(
        config=config,
        closed_form=closed_form,
        facts={name: dict(next(iter(seeds.values()))["facts"]) for name, seeds in units.items()},
        correlations=correlations,
        correlation_ranges=ranges,
        arms={name: summarise_arms(list(seeds.values())) for name, seeds in units.items()},
    )


def summarise_arms(units: Sequence[Mapping[str, Any]]) -> dict[str, ArmSummary]:
    """Every arm of one experiment; ``units`` are its seeds."""
    values = {
        arm: {key: np.array([u["arms"][arm][key] for u in units], float) for key in measures}
        for arm, measures in units[0]["arms"].items()
    }
    plain_loss = values[PLAIN]["l_gt"]
    percent = 100 / plain_loss.mean()
    changes = {arm: (v["l_gt"] - plain_loss) * percent for arm, v in values.items()}
    tested = [arm for arm in values if arm != PLAIN]
    adjusted = dict(zip(tested, holm([_p_value(changes[a]) for a in tested]), strict=True))
    found = {}
    for arm, v in values.items():
        control = ARMS[arm].control
        against = None if control is None else changes[arm] - changes[control]
        against_interval = None if against is None else _t_interval(against)
        p = adjusted.get(arm, 1.0)
        found[arm] = ArmSummary(
            l_gt=float(v["l_gt"].mean()),
            change=float(changes[arm].mean()),
            change_interval=_t_interval(changes[arm]),
            wins=int((changes[arm] < 0).sum()),
            p_holm=p,
            against_control=None if against is None else float(against.mean()),
            against_control_interval=against_interval,
            mmcs=float(v["mmcs"].mean()),
            mmcs_change=float((v["mmcs"] - values[PLAIN]["mmcs"]).mean()),
            recovered=float(v["recovered"].mean()),
            features_per_latent=float(v["features_per_latent"].mean()),
            fvu=float(v["fvu"].mean()),
            verdict=_verdict(float(changes[arm].mean()), p, against_interval),
        )
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): reject where the result is below the level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _p_value(differences: np.ndarray) -> float:
    """Two-sided paired t-test; 1 where there is no difference at all."""
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _t_interval(differences: np.ndarray) -> tuple[float, float]:
    n = len(differences)
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * differences.std(ddof=1) / math.sqrt(n)
    return float(differences.mean() - half), float(differences.mean() + half)


def _verdict(change: float, p: float, against: tuple[float, float] | None) -> str:
    if p >= _SIGNIFICANT:
        return "–"
    if change > 0:
        return "worse"
    return "better" if against is not None and against[1] < 0 else "as random"


def _cell(s: ArmSummary) -> str:
    mark = {"better": "*", "as random": "~", "worse": "!"}.get(s.verdict, "")
    return f"{s.change:+.1f}{mark} {s.wins}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"[{interval[0]:+.1f}, {interval[1]:+.1f}]"


def _align(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if i and len(row) > 2 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def _markdown(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(cell.replace(chr(10), ' ') for cell in row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
