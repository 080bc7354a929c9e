"""Arms against the plain one: paired differences, intervals, controls, and one word for each arm.

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

from llm_wsae.theory.rules import ARMS, PLAIN

LEVEL = 0.95
_SIGNIFICANT = 1 - LEVEL


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


def summarise_arms(units: Sequence[Mapping[str, Any]]) -> dict[str, ArmSummary]:
    """Every arm of one experiment; ``units`` are the results of its seeds."""
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
