"""Arms against the plain one: paired differences, intervals, controls, and one word for each arm.

A difference is an arm's minus the plain arm's on the same seed. The word is earned twice: against
the plain arm, Holm's correction over the arms of the experiment, and against each control on the
same schedule, because a training stuck in a local optimum is helped by almost any disturbance.
Permuted weights are compared like all others, but are nobody's claim: they are not counted among
the arms that the correction is for.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from llm_wsae.statistics.multiple_testing import holm
from llm_wsae.theory.rules import ARMS, PLAIN, SHOWN

LEVEL = 0.95
_SIGNIFICANT = 1 - LEVEL


@dataclass(frozen=True)
class Change:
    """A change of L_GT."""

    mean: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class ArmSummary:
    """One arm of one experiment against the plain arm. Changes of L_GT and their 95 % intervals
    (paired t over seeds) are in per cent of the plain arm's mean."""

    l_gt: float
    change: Change
    wins: int
    """Seeds on which L_GT is lower than plain."""
    p_holm: float
    """Of the paired t-test, adjusted for the arms of the experiment (Holm 1979); for permuted
    weights as it is."""
    against: dict[str, Change]
    """The same against its controls, by their names; none for a control."""
    mmcs: float
    mmcs_change: float
    recovered: float
    features_per_latent: float
    fvu: float
    verdict: str
    """better, as a control (better than plain, not than every control), worse, or –."""


def summarise_arms(units: Sequence[Mapping[str, Any]]) -> dict[str, ArmSummary]:
    """Every arm of one experiment; ``units`` are the results of its seeds."""
    values = {
        arm: {key: np.array([u["arms"][arm][key] for u in units], float) for key in measures}
        for arm, measures in units[0]["arms"].items()
    }
    plain_loss = values[PLAIN]["l_gt"]
    percent = 100 / plain_loss.mean()
    differences = {arm: (v["l_gt"] - plain_loss) * percent for arm, v in values.items()}
    p_values = {arm: _p_value(differences[arm]) for arm in values}
    adjusted = dict(zip(SHOWN, holm([p_values[arm] for arm in SHOWN]), strict=True))
    found = {}
    for arm, v in values.items():
        change = _change(differences[arm])
        against = {
            control: _change(differences[arm] - differences[control])
            for control in ARMS[arm].controls
        }
        p = adjusted.get(arm, p_values[arm])
        found[arm] = ArmSummary(
            l_gt=float(v["l_gt"].mean()),
            change=change,
            wins=int((differences[arm] < 0).sum()),
            p_holm=p,
            against=against,
            mmcs=float(v["mmcs"].mean()),
            mmcs_change=float((v["mmcs"] - values[PLAIN]["mmcs"]).mean()),
            recovered=float(v["recovered"].mean()),
            features_per_latent=float(v["features_per_latent"].mean()),
            fvu=float(v["fvu"].mean()),
            verdict=_verdict(change, p, against),
        )
    return found


def _p_value(differences: np.ndarray) -> float:
    """Two-sided paired t-test; 1 where there is no difference at all."""
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _change(differences: np.ndarray) -> Change:
    n, mean = len(differences), float(differences.mean())
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * differences.std(ddof=1) / math.sqrt(n))
    return Change(mean, (mean - half, mean + half))


def _verdict(change: Change, p: float, against: Mapping[str, Change]) -> str:
    if p >= _SIGNIFICANT:
        return "–"
    if change.mean > 0:
        return "worse"
    beats_all = against and all(one.interval[1] < 0 for one in against.values())
    return "better" if beats_all else "as a control"
