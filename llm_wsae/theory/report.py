"""The report of the planted experiments: from the results of their units to tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_wsae.provenance import plain
from llm_wsae.terminal import aligned, markdown
from llm_wsae.theory.comparison import (
    BETTER,
    NO_BETTER_THAN_CONTROL,
    WORSE,
    ArmSummary,
    Change,
    summarise_arms,
)
from llm_wsae.theory.config import EXPERIMENTS, TheoryConfig
from llm_wsae.theory.rules import ARMS, CONTROLS, PLAIN, PLAIN_RULE, RULES, SHOWN

SCORING = tuple(rule for rule in RULES if rule != PLAIN_RULE)
"""The rules that give dimensions different scores."""
_GAP_AT = 0.7  # sparsity S
_COLUMNS = 5  # experiments in one table, so that it fits a terminal
Titled = tuple[str, list[list[str]]]  # a table: its title, and its rows with the header first


@dataclass(frozen=True)
class TheoryReport:
    """All planted experiments."""

    config: TheoryConfig
    closed_form: dict[str, dict[str, Any]]
    facts: dict[str, dict[str, Any]]
    """Sizes of each experiment."""
    correlations: dict[str, dict[str, float | None]]
    """By experiment and rule: mean over seeds of Spearman's ρ with the true monosemanticity; None
    where one of the two is constant."""
    correlation_ranges: dict[str, dict[str, tuple[float, float] | None]]
    """The smallest and the largest ρ over seeds."""
    arms: dict[str, dict[str, ArmSummary]]
    """By experiment and arm."""

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
        """For a terminal: closed form, rank correlations, changes of L_GT, experiments."""
        names = list(self.arms)
        parts = [names[i : i + _COLUMNS] for i in range(0, len(names), _COLUMNS)]
        tables = [
            self.closed_form_table(),
            *(self.correlation_table(part) for part in parts),
            *(self.change_table(part) for part in parts),
            self.experiment_table(),
        ]
        return "\n\n".join(
            f"{title}\n\n{aligned(rows, left=_left(rows))}" for title, rows in tables
        )

    def markdown(self) -> str:
        """The same tables in Markdown, and one with every measure for each experiment."""
        names = list(self.arms)
        tables = (
            self.closed_form_table(),
            self.experiment_table(),
            self.correlation_table(names),
            self.change_table(names),
        )
        parts = ["# Planted experiments"]
        for title, rows in tables:
            parts += [title, markdown(rows, left=_left(rows))]
        for name in names:
            parts += [f"## {name}", self._describe(name), markdown(self._details(name))]
        return "\n\n".join(parts) + "\n"

    def closed_form_table(self) -> Titled:
        """For each mixture: the assumptions, the sparsity needed, and what Γ does to the gap."""
        head = ["W_p", "n", "n_p", "assumption holds", "interference", "norm error"]
        head += ["S for 5 % error", "‖W_pᵀW_p − I‖", "… with Γ", f"gap at S = {_GAP_AT}"]
        rows = [[*head, "… with Γ"]]
        for name, one in self.closed_form.items():
            needed = one["sparsity_needed"]
            (at,) = (point for point in one["by_sparsity"] if point["sparsity"] == _GAP_AT)
            rows.append(
                [
                    name,
                    str(one["n"]),
                    str(one["n_p"]),
                    "yes" if one["assumptions_hold"] else "no",
                    f"{one['largest_interference']:.3f}",
                    f"{one['largest_norm_error']:.3f}",
                    "never" if needed is None else f"{needed:.3f}",
                    f"{one['gap_norm']:.2f}",
                    f"{one['gap_norm_weighted']:.2f}",
                    f"{at['gap']:+.3f}",
                    f"{at['gap_weighted']:+.3f}",
                ]
            )
        title = (
            "Closed form: does W_p meet the assumption of theorem 1 (interference ≤ 0, unit "
            "columns)?\n"
            "The gap L_SAE − L_GT, plain and with the Γ that minimises ‖W_pᵀΓ²W_p − I‖ "
            "(theorems 4, 5; 0: no gap)"
        )
        return title, rows

    def experiment_table(self) -> Titled:
        """For each experiment: its purpose and its sizes."""
        return "Experiments", [
            ["name", "purpose and sizes"],
            *([n, self._describe(n)] for n in self.arms),
        ]

    def correlation_table(self, names: Sequence[str]) -> Titled:
        """Rules × experiments."""
        rows = [["rule", *names]]
        for rule in SCORING:
            values = [self.correlations[name][rule] for name in names]
            rows.append([rule, *("–" if v is None else f"{v:+.2f}" for v in values)])
        title = "Rank correlation of each rule with the true monosemanticity 1/PR (1: same order)"
        return title, rows

    def change_table(self, names: Sequence[str]) -> Titled:
        """Arms × experiments."""
        rows = [["arm", *names]]
        rows.append([PLAIN, *(f"{self.arms[name][PLAIN].l_gt:.3f}" for name in names)])
        for arm in SHOWN:
            rows.append([arm, *(_cell(self.arms[name][arm]) for name in names)])
        return (
            "Change of L_GT relative to plain in % (negative is better), and on how many of "
            f"{len(self.config.seeds)} seeds it is lower; first line: L_GT of plain.\n"
            "* better than plain and than every control, ~ better than plain only, "
            "! worse than plain (Holm's correction over arms)",
            rows,
        )

    def _describe(self, name: str) -> str:
        e, facts = EXPERIMENTS[name], self.facts[name]
        return (
            f"{e.why}: n = {facts['n']}, S = {e.sparsity:g}, k = {facts['k']}, "
            f"learning rate {e.learning_rate:g}"
        )

    def _details(self, name: str) -> list[list[str]]:
        against = [f"minus {control} %" for control in CONTROLS]
        head = ["arm", "L_GT", "change %", "wins", *against, "MMCS", "change", "recovered"]
        rows = [[*head, "features/latent", "FVU", "verdict"]]
        for arm, s in self.arms[name].items():
            rows.append(
                [
                    arm,
                    f"{s.l_gt:.3f}",
                    change_text(s.change),
                    f"{s.wins}/{len(self.config.seeds)}",
                    *_by_control(s.against),
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
    units: Mapping[str, Sequence[Mapping[str, Any]]],
    closed_form: dict[str, dict[str, Any]],
    config: TheoryConfig,
) -> TheoryReport:
    """Summarise the results of every experiment's seeds."""
    correlations, ranges = {}, {}
    for name, seeds in units.items():
        found = {rule: [u["correlations"][rule] for u in seeds] for rule in RULES}
        known = {r: [v for v in values if v is not None] for r, values in found.items()}
        correlations[name] = {r: float(np.mean(v)) if v else None for r, v in known.items()}
        ranges[name] = {r: (min(v), max(v)) if v else None for r, v in known.items()}
    return TheoryReport(
        config=config,
        closed_form=closed_form,
        facts={name: dict(seeds[0]["facts"]) for name, seeds in units.items()},
        correlations=correlations,
        correlation_ranges=ranges,
        arms={name: summarise_arms(seeds) for name, seeds in units.items()},
    )


def change_text(change: Change) -> str:
    """``-1.3 [-3.1, +0.4]``."""
    return f"{change.mean:+.1f} [{change.interval[0]:+.1f}, {change.interval[1]:+.1f}]"


def _by_control(against: Mapping[str, Change]) -> list[str]:
    """One cell for each kind of control, empty where there is none."""
    found = {ARMS[name].control: change_text(change) for name, change in against.items()}
    return [found.get(rule, "") for rule in CONTROLS]


def _left(rows: Sequence[Sequence[str]]) -> int:
    """How many columns are text: both of a list of names and meanings."""
    return 2 if len(rows[0]) == 2 else 1


def _cell(s: ArmSummary) -> str:
    mark = {BETTER: "*", NO_BETTER_THAN_CONTROL: "~", WORSE: "!"}.get(s.verdict, "")
    return f"{s.change.mean:+.1f}{mark} {s.wins}"
