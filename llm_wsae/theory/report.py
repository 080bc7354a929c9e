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
    change_text,
    summarise_arms,
)
from llm_wsae.theory.config import EXPERIMENTS, SWEEPS, TheoryConfig
from llm_wsae.theory.rules import ARMS, CONTROLS, PLAIN, PLAIN_RULE, RULES, SHOWN
from llm_wsae.theory.sweeps import PointSummary, Titled, summarise_point, sweep_table
from llm_wsae.theory.untrained import UNTRAINED

SCORING = tuple(rule for rule in RULES if rule != PLAIN_RULE)
"""The rules that give dimensions different scores."""
_GAP_AT = 0.7  # sparsity S
_ONE_SCALE = f"{PLAIN}, one scale"
_UNTRAINED_MEASURES = ("l_gt", "l_gt_one_scale", "absorbed", "merged")
_COLUMNS = 5  # experiments in one table, so that it fits a terminal


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
    untrained: dict[str, dict[str, dict[str, float]]]
    """By experiment and dictionary (``UNTRAINED``): means over seeds of ``l_gt``,
    ``l_gt_one_scale``, and of ``absorbed`` and ``merged`` where features are related."""
    sweeps: dict[str, dict[str, PointSummary]]
    """By sweep and point."""

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
                "untrained": self.untrained,
                "sweeps": {
                    name: {"settings": SWEEPS[name].points, "points": points}
                    for name, points in self.sweeps.items()
                },
            }
        )

    def table(self) -> str:
        """For a terminal: closed form, gap, rank correlations, changes of L_GT, related features,
        sweeps, experiments."""
        names = list(self.arms)
        parts = [names[i : i + _COLUMNS] for i in range(0, len(names), _COLUMNS)]
        tables = [
            self.closed_form_table(),
            self.gap_table(),
            *(self.correlation_table(part) for part in parts),
            *(self.change_table(part) for part in parts),
            *self.related_tables(),
            *self.sweep_tables(),
            *([self.experiment_table()] if names else []),
        ]
        return "\n\n".join(
            f"{title}\n\n{aligned(rows, left=_left(rows))}" for title, rows in tables
        )

    def markdown(self) -> str:
        """The same tables in Markdown, and one with every measure for each experiment."""
        names = list(self.arms)
        tables = [self.closed_form_table(), self.gap_table()]
        if names:
            tables += [
                self.experiment_table(),
                self.correlation_table(names),
                self.change_table(names),
                self.one_scale_table(names),
            ]
        tables += [*self.related_tables(), *self.sweep_tables()]
        parts = ["# Planted experiments"]
        for title, rows in tables:
            parts += [title, markdown(rows, left=_left(rows))]
        for name in names:
            parts += [f"## {name}", self._describe(name), markdown(self._details(name))]
        return "\n\n".join(parts) + "\n"

    def closed_form_table(self) -> Titled:
        """For each mixture: the assumptions, the sparsity needed, and the losses' gap."""
        head = ["W_p", "n", "n_p", "assumption holds", "interference", "norm error"]
        head += ["S for 5 % error", f"gap at S = {_GAP_AT}", "best scalar", "best γ"]
        rows = [[*head, "whitening"]]
        for name, one in self.closed_form.items():
            needed = one["sparsity_needed"]
            (at,) = (point for point in one["by_sparsity"] if point["sparsity"] == _GAP_AT)
            gaps = ("gap", "gap_best_scalar", "gap_weighted", "gap_whitening")
            rows.append(
                [
                    name,
                    str(one["n"]),
                    str(one["n_p"]),
                    "yes" if one["assumptions_hold"] else "no",
                    f"{one['largest_interference']:.3f}",
                    f"{one['largest_norm_error']:.3f}",
                    "never" if needed is None else f"{needed:.3f}",
                    *(f"{at[key]:+.3f}" for key in gaps),
                ]
            )
        return (
            "Closed form: does W_p meet the assumption of theorem 1 (interference ≤ 0, unit "
            "columns)?\nThe gap L_WSAE − L_GT (theorems 4, 5), plain and with the Γ of each kind "
            "that minimises ‖W_pᵀΓ²W_p − I‖",
            rows,
        )

    def gap_table(self) -> Titled:
        """For each mixture: the norm of the gap's matrix with weights, and what limits it."""
        names = list(next(iter(self.closed_form.values()))["gap_norms"]["weights"])
        rows = [["W_p", "none", "best scalar", *names, "whitening", "bound"]]
        for name, one in self.closed_form.items():
            norms = one["gap_norms"]
            shown = [norms["none"], norms["best_scalar"], *norms["weights"].values()]
            shown += [norms["whitening"], norms["bound"]]
            rows.append([name, *(f"{norm:.2f}" for norm in shown)])
        title = (
            "Theorem 5: ‖W_pᵀΓ²W_p − I‖ without weights, with the best multiple of I, and with "
            "each rule's weights at their best scale;\n"
            "whitening is the optimum over all Γ, Γ² = (W_pW_pᵀ)⁺, and the bound √(n − rank W_p)"
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
        """Arms × experiments: change of L_GT."""
        plain_arms = [self.arms[name][PLAIN] for name in names]
        rows = [["arm", *names]]
        rows.append([PLAIN, *(f"{arm.l_gt:.3f}" for arm in plain_arms)])
        rows.append([_ONE_SCALE, *(f"{arm.l_gt_one_scale:.3f}" for arm in plain_arms)])
        rows += self._untrained_rows(names, "l_gt")
        for arm in SHOWN:
            rows.append([arm, *(_cell(self.arms[name][arm]) for name in names)])
        return (
            "Change of L_GT relative to plain in % (negative is better), and on how many of "
            f"{len(self.config.seeds)} seeds it is lower.\n"
            "First lines: L_GT of plain with a scale for each feature, which is what changes, and "
            "with one scale for all;\nand of what nobody trained, with a scale for each.\n"
            "* better than plain and than every control, ~ better than plain only, "
            "! worse than plain (Holm's correction over arms)",
            rows,
        )

    def one_scale_table(self, names: Sequence[str]) -> Titled:
        """Arms × experiments: change of L_GT with one scale for all features."""
        plain_arms = (self.arms[name][PLAIN] for name in names)
        rows = [["arm", *names]]
        rows.append([_ONE_SCALE, *(f"{arm.l_gt_one_scale:.3f}" for arm in plain_arms)])
        rows += self._untrained_rows(names, "l_gt_one_scale")
        for arm in SHOWN:
            changes = (self.arms[name][arm].change_one_scale for name in names)
            rows.append([arm, *(_certain(change) for change in changes)])
        return (
            "The same with one scale for all features: change of L_GT in %; in brackets if its "
            "95 % interval, not corrected for the number of arms, holds 0.",
            rows,
        )

    def _untrained_rows(self, names: Sequence[str], measure: str) -> list[list[str]]:
        return [
            [f"untrained: {one}", *(f"{self.untrained[name][one][measure]:.3f}" for name in names)]
            for one in UNTRAINED
        ]

    def related_tables(self) -> list[Titled]:
        """Absorption and merging by arm, if there are experiments with related features."""
        names = [name for name, arms in self.arms.items() if arms[PLAIN].merged is not None]
        if not names:
            return []
        measured = [
            (name, measure)
            for name in names
            for measure in ("absorbed", "merged")
            if getattr(self.arms[name][PLAIN], measure) is not None
        ]
        rows = [["arm", *(f"{name}: {measure}" for name, measure in measured)]]
        for arm in (PLAIN, *SHOWN):
            shares = (getattr(self.arms[name][arm], measure) for name, measure in measured)
            rows.append([arm, *(_with_margin(share) for share in shares)])
        for one in UNTRAINED:
            means = (self.untrained[name][one].get(measure) for name, measure in measured)
            cells = ("–" if mean is None else f"{mean:+.3f}" for mean in means)
            rows.append([f"untrained: {one}", *cells])
        title = (
            "Related features, mean ± half of the 95 % interval. absorbed: how much more often the "
            "parent's latent is silent\nwhen a child is active; merged: share of related features "
            "whose latent is also that of a relative"
        )
        return [(title, rows)]

    def sweep_tables(self) -> list[Titled]:
        """One table for each sweep."""
        return [sweep_table(name, points) for name, points in self.sweeps.items()]

    def _describe(self, name: str) -> str:
        e, facts = EXPERIMENTS[name], self.facts[name]
        return (
            f"{e.why}: n = {facts['n']}, S = {e.sparsity:g}, k = {facts['k']}, "
            f"learning rate {e.learning_rate:g}"
        )

    def _details(self, name: str) -> list[list[str]]:
        against = [f"minus {control} %" for control in CONTROLS]
        head = ["arm", "L_GT", "change %", "one scale", "change %", "wins", *against]
        head += ["MMCS", "change", "recovered", "features/latent", "FVU"]
        rows = [[*head, "verdict"]]
        for arm, s in self.arms[name].items():
            rows.append(
                [
                    arm,
                    f"{s.l_gt:.3f}",
                    change_text(s.change),
                    f"{s.l_gt_one_scale:.3f}",
                    change_text(s.change_one_scale),
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
    without: Mapping[str, Sequence[Mapping[str, Any]]],
    sweep_units: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    sweep_without: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    closed_form: dict[str, dict[str, Any]],
    config: TheoryConfig,
) -> TheoryReport:
    """Summarise the results of the seeds of every experiment and of every point of a sweep, with
    training and without."""
    correlations, ranges = {}, {}
    for name, seeds in units.items():
        found = {rule: [u["correlations"][rule] for u in seeds] for rule in RULES}
        known = {r: [v for v in values if v is not None] for r, values in found.items()}
        correlations[name] = {r: float(np.mean(v)) if v else None for r, v in known.items()}
        ranges[name] = {r: (min(v), max(v)) if v else None for r, v in known.items()}
    sweeps: dict[str, dict[str, PointSummary]] = {}
    for (name, label), seeds in sweep_units.items():
        sweeps.setdefault(name, {})[label] = summarise_point(seeds, sweep_without[name, label])
    return TheoryReport(
        config=config,
        closed_form=closed_form,
        facts={name: dict(seeds[0]["facts"]) for name, seeds in units.items()},
        correlations=correlations,
        correlation_ranges=ranges,
        arms={name: summarise_arms(seeds) for name, seeds in units.items()},
        untrained={
            name: {
                one: {
                    m: float(np.mean([unit[one][m] for unit in seeds]))
                    for m in _UNTRAINED_MEASURES
                    if all(unit[one][m] is not None for unit in seeds)
                }
                for one in UNTRAINED
            }
            for name, seeds in without.items()
        },
        sweeps=sweeps,
    )


def _by_control(against: Mapping[str, Change]) -> list[str]:
    """One cell for each kind of control, empty where there is none."""
    found = {ARMS[name].control: change_text(change) for name, change in against.items()}
    return [found.get(rule, "") for rule in CONTROLS]


def _left(rows: Sequence[Sequence[str]]) -> int:
    """How many columns are text: both of a list of names and meanings."""
    return 2 if len(rows[0]) == 2 else 1


def _with_margin(change: Change) -> str:
    return f"{change.mean:+.3f} ± {(change.interval[1] - change.interval[0]) / 2:.3f}"


def _certain(change: Change) -> str:
    text = f"{change.mean:+.1f}"
    return text if change.interval[0] * change.interval[1] > 0 else f"({text})"


def _cell(s: ArmSummary) -> str:
    mark = {BETTER: "*", NO_BETTER_THAN_CONTROL: "~", WORSE: "!"}.get(s.verdict, "")
    return f"{s.change.mean:+.1f}{mark} {s.wins}"
