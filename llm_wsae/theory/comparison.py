"""Each arm compared with the plain one: paired differences, intervals, controls, and a verdict.

A difference is an arm's L_GT minus the plain arm's on the same seed. An arm is better only if it
passes two comparisons: with the plain arm, after Holm's correction over the arms of the experiment,
and with each control on the same schedule, because almost any disturbance helps a training that is
stuck in a local optimum. Matched controls are compared like all others, but no claim is made about
them, so the correction does not count them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from llm_wsae.statistics.uncertainty import holm
from llm_wsae.theory.rules import ARMS, PLAIN, SHOWN

LEVEL = 0.95
_SIGNIFICANT = 1 - LEVEL
BETTER, NO_BETTER_THAN_CONTROL, WORSE, NO_DIFFERENCE = VERDICTS = (
    "better",
    "no better than a control",
    "worse",
    "–",
)
"""Lower L_GT than plain and than every control; lower than plain only; higher than plain; none."""


@dataclass(frozen=True)
class Change:
    """A mean over seeds, of a change or of a measure, and its 95 % interval (t)."""

    mean: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class ArmSummary:
    """One arm of one experiment compared with the plain arm. Changes of L_GT and their 95 %
    intervals (paired t over seeds) are in per cent of the plain arm's mean."""

    l_gt: float
    change: Change
    l_gt_one_scale: float
    """L_GT with one scale for all features (``recovery.Recovery``)."""
    change_one_scale: Change
    """Its change, in per cent of the plain arm's."""
    wins: int
    """Seeds on which L_GT is lower than plain."""
    p_holm: float
    """P-value of the paired t-test, adjusted for the arms of the experiment (Holm 1979); not
    adjusted for matched controls."""
    against: dict[str, Change]
    """Change relative to each of its controls, by name; empty for a control."""
    mmcs: float
    mmcs_change: float
    recovered: float
    features_per_latent: float
    fvu: float
    absorbed: Change | None
    """Its mean; None where no feature has a parent, or no child is ever active."""
    merged: Change | None
    """Its mean; None where no features are related."""
    verdict: str
    """One of ``VERDICTS``."""


def summarise_arms(units: Sequence[Mapping[str, Any]]) -> dict[str, ArmSummary]:
    """Summaries of every arm of one experiment; ``units`` are the results of its seeds."""
    values = {
        arm: {key: np.array([u["arms"][arm][key] for u in units], float) for key in measures}
        for arm, measures in units[0]["arms"].items()
    }
    plain_loss = values[PLAIN]["l_gt"]
    differences = {arm: _per_cent(v["l_gt"], plain_loss) for arm, v in values.items()}
    p_values = {arm: _p_value(differences[arm]) for arm in values}
    adjusted = dict(zip(SHOWN, holm([p_values[arm] for arm in SHOWN]), strict=True))
    found = {}
    for arm, v in values.items():
        change = mean_over_seeds(differences[arm])
        against = {
            control: mean_over_seeds(differences[arm] - differences[control])
            for control in ARMS[arm].controls
        }
        p = adjusted.get(arm, p_values[arm])
        found[arm] = ArmSummary(
            l_gt=float(v["l_gt"].mean()),
            change=change,
            l_gt_one_scale=float(v["l_gt_one_scale"].mean()),
            change_one_scale=mean_over_seeds(
                _per_cent(v["l_gt_one_scale"], values[PLAIN]["l_gt_one_scale"])
            ),
            wins=int((differences[arm] < 0).sum()),
            p_holm=p,
            against=against,
            mmcs=float(v["mmcs"].mean()),
            mmcs_change=float((v["mmcs"] - values[PLAIN]["mmcs"]).mean()),
            recovered=float(v["recovered"].mean()),
            features_per_latent=float(v["features_per_latent"].mean()),
            fvu=float(v["fvu"].mean()),
            absorbed=_mean_if_measured(v["absorbed"]),
            merged=_mean_if_measured(v["merged"]),
            verdict=_verdict(change, p, against),
        )
    return found


def change_text(change: Change, form: str = "+.1f") -> str:
    """``-1.3 [-3.1, +0.4]``."""
    low, high = change.interval
    return f"{change.mean:{form}} [{low:{form}}, {high:{form}}]"


def _per_cent(values: np.ndarray, plain: np.ndarray) -> np.ndarray:
    return (values - plain) * (100 / plain.mean())


def _mean_if_measured(values: np.ndarray) -> Change | None:
    mean = mean_over_seeds(values)  # None is NaN here
    return None if math.isnan(mean.mean) else mean


def _p_value(differences: np.ndarray) -> float:
    """Two-sided paired t-test; 1 where there is no difference at all."""
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def mean_over_seeds(values: np.ndarray) -> Change:
    """The mean of one value for each seed, and its interval."""
    n, mean = len(values), float(values.mean())
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return Change(mean, (mean - half, mean + half))


def _verdict(change: Change, p: float, against: Mapping[str, Change]) -> str:
    if p >= _SIGNIFICANT:
        return NO_DIFFERENCE
    if change.mean > 0:
        return WORSE
    beats_all = against and all(one.interval[1] < 0 for one in against.values())
    return BETTER if beats_all else NO_BETTER_THAN_CONTROL
