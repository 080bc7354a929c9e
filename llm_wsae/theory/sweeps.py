"""Sweeps: few arms at many settings of sparsity, activation and size.

A unit of work is one point of a sweep on one seed. The paper's toy experiment and its three
conditions are such sweeps (``config.SWEEPS``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from llm_wsae.statistics.moments import Statistics
from llm_wsae.statistics.second_moment import SecondMoment
from llm_wsae.theory.arm_trainer import ArmTrainer
from llm_wsae.theory.comparison import Change, change_text, mean_over_seeds
from llm_wsae.theory.config import SWEEPS, Point, TheoryConfig
from llm_wsae.theory.jobs import Check
from llm_wsae.theory.rules import PLAIN, Known
from llm_wsae.theory.superposition import REGIMES, Stream, generator, number
from llm_wsae.theory.tied import Schedule
from llm_wsae.theory.untrained import UNTRAINED

LEARNING_RATE = 0.01
Titled = tuple[str, list[list[str]]]  # a table: its title, and its rows with the header first
MEASURES = ("l_gt", "l_gt_one_scale", "recovered", "features_per_latent", "mmcs", "fvu")
_REPRESENTED = 0.5  # length of a column of W_p; a shorter feature is hardly in the data


def run_point(
    point: Point,
    arms: Sequence[str],
    seed: int,
    config: TheoryConfig,
    check: Check = lambda: None,
) -> dict[str, Any]:
    """One setting on one seed: what the dictionary of each arm recovers. JSON-able.

    The arms' rules may read statistics and the truth only.
    """
    data = REGIMES[point.regime](point.sparsity, generator(seed, Stream.DATA))
    sample = data.observe(data.features(config.rows, generator(seed, Stream.SAMPLE)))
    statistics = Statistics(len(data.mixing), 1, sample_rows=config.rows)
    statistics.update(sample, torch.zeros(len(sample), dtype=torch.int64))
    known = Known(
        statistics,
        second_moment=SecondMoment(len(data.mixing)).update(sample),
        truth=data,
        draw=number(seed, Stream.CONTROL),
    )
    schedule = Schedule(
        num_latents=point.latents,
        k=point.kept,
        steps=config.steps,
        batch=config.batch_size,
        learning_rate=LEARNING_RATE,
    )
    x = data.features(config.rows, generator(seed, Stream.TEST))
    recovered, _ = ArmTrainer(data, schedule, x, seed, check)(list(arms), known)
    return {
        "facts": {
            "n": data.num_features,
            "n_p": len(data.mixing),
            "mean_active": data.mean_active,
            "represented": float((data.mixing.norm(dim=0) > _REPRESENTED).float().mean()),
        },
        "arms": {arm: asdict(recovered[arm]) for arm in arms},
    }


@dataclass(frozen=True)
class PointSummary:
    """One point of a sweep. Intervals are of the mean over seeds (t, 95 %)."""

    represented: float
    """Share of features whose column of W_p is longer than ½."""
    measures: dict[str, dict[str, Change]]
    """By arm and measure: its mean."""
    changes: dict[str, Change]
    """By arm: change of L_GT from plain, paired, in per cent of plain's mean."""
    untrained: dict[str, dict[str, float]]
    """By dictionary (``UNTRAINED``) and measure: its mean."""


def summarise_point(
    units: Sequence[Mapping[str, Any]], without: Sequence[Mapping[str, Any]]
) -> PointSummary:
    """The summary of one point; ``units`` are the results of its seeds, and ``without`` those of
    what nobody trained."""

    def values(arm: str, measure: str) -> np.ndarray:
        return np.array([unit["arms"][arm][measure] for unit in units], float)

    plain, arms = values(PLAIN, "l_gt"), list(units[0]["arms"])
    return PointSummary(
        represented=float(np.mean([unit["facts"]["represented"] for unit in units])),
        measures={a: {m: mean_over_seeds(values(a, m)) for m in MEASURES} for a in arms},
        changes={
            a: mean_over_seeds((values(a, "l_gt") - plain) * (100 / plain.mean()))
            for a in arms
            if a != PLAIN
        },
        untrained={
            one: {m: float(np.mean([unit[one][m] for unit in without])) for m in MEASURES}
            for one in UNTRAINED
        },
    )


def sweep_table(name: str, points: Mapping[str, PointSummary]) -> Titled:
    """A row for each point: what plain recovers, and how weights change its L_GT."""
    sweep = SWEEPS[name]
    weighted = [arm for arm in sweep.arms if arm != PLAIN]
    head = ["point", "S", "activation", "n_m", "W_p > ½", "L_GT", "one scale", "recovered"]
    rows = [[*head, "features/latent", *(f"{arm} %" for arm in weighted), *UNTRAINED]]
    for label, summary in points.items():
        point, plain = sweep.points[label], summary.measures[PLAIN]
        rows.append(
            [
                label,
                f"{point.sparsity:g}",
                point.activation,
                str(point.latents),
                f"{summary.represented:.2f}",
                f"{plain['l_gt'].mean:.3f}",
                f"{plain['l_gt_one_scale'].mean:.3f}",
                change_text(plain["recovered"], ".2f"),
                change_text(plain["features_per_latent"], ".1f"),
                *(change_text(summary.changes[arm], "+.1f") for arm in weighted),
                *(f"{summary.untrained[one]['l_gt']:.3f}" for one in UNTRAINED),
            ]
        )
    learnt_nothing = [own for summary in points.values() for own in summary.untrained.values()]
    most = max(own["recovered"] for own in learnt_nothing)
    shared = [own["features_per_latent"] for own in learnt_nothing]
    title = (
        f"{name}: {sweep.why}.\n"
        "L_GT of plain, its change by weights in %, and of what nobody trained (recovered "
        f"≤ {most:.2f}; features/latent {min(shared):.1f} to {max(shared):.1f}); "
        "W_p > ½: share with a longer column"
    )
    return title, rows
