"""Is a difference more than chance? Intervals over seeds and over latents or families of concepts.

A difference is measured once per seed, and seeds are few: a percentile bootstrap over them is far
too confident (resampling three seeds gives intervals that cover the truth in about 80 % of cases,
not 95 %). Instead the variance is decomposed as in an analysis of variance:

* Over seeds. Three numbers say little about their variance, so it is pooled over the arms. Arms
  share the plain dictionaries they are compared with, hence also part of their error, which more
  arms do not average away. So the pool, the mean of the arms' variances, has fewer degrees of
  freedom than all arms together, by the part of the variance that a seed's arms have in common
  (Satterthwaite's approximation, 1946): S − 1 if all of it is, U(S − 1) if none is and every arm
  has S seeds; in between they follow from the products of the arms' deviations on the seeds that
  two of them share. An arm whose own spread exceeds the pool's keeps its own.
  (If its true spread is three times that of the others, three seeds still err in about 11 % of
  cases instead of 5, five seeds in 10 %.) Weights that are drawn again for every seed spread by
  their draw, each kind differently: they, and differences from them, stay out of the pool and use
  their own spread with S − 1 degrees of freedom.
* Over latents. Each seed's dictionary has its own latents, so the spread over seeds already
  contains their choice, and the test over seeds alone is valid. But a few seeds may agree by
  chance, so a second test asks whether the spread of the latents themselves, of which there are
  thousands, would explain the difference. The wider interval and the larger p of the two count. (It
  treats the dictionaries of a difference as independent. They start alike, so this errs on the wide
  side.)
* Over families of concepts. All dictionaries are probed for the same concepts, so their choice does
  not average out over seeds. Nor are concepts independent: what happens to one first letter happens
  to the others. So a mean is taken within each family, families count alike, and the variance of
  their mean differences beyond noise is added (seeds and families as crossed random effects, Clark
  1973, with one measurement in each cell). Planted features, which are drawn independently, enter
  one by one in the same way.

* Over documents. All dictionaries are scored on the same text, so which documents it holds does not
  average out over seeds either. Where means are known on resamplings of the documents (bootstrap,
  Efron 1979; the same resamplings for all dictionaries), the variance over them that seeds have in
  common is added to both tests.

Differences of several rules and measures are then corrected together (``adjusted``).
"""

import itertools
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from scipy import special

from llm_wsae.statistics.uncertainty import holm
from llm_wsae.studies.curve import Value

LEVEL = 0.95
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Estimate:
    """A mean difference."""

    difference: float
    interval: tuple[float, float]
    """95 %, for this difference alone."""
    p: float
    """Of no difference, two-sided, for this difference alone."""
    error: float
    """Standard error, of the wider interval."""
    degrees: float
    """Its degrees of freedom; infinite if the error is that over latents."""
    by_seed: dict[int, float]


def estimates(
    differences: Mapping[Name, Mapping[int, Value]], apart: Collection[Name] = ()
) -> dict[Name, Estimate]:
    """One estimate for each arm's differences by seed, all of one measure.

    Arms named in ``apart`` stay out of the pool. An arm with a single seed has no estimate.
    """
    several = {name: dict(sorted(own.items())) for name, own in differences.items() if len(own) > 1}
    together = [own for name, own in several.items() if name not in apart]
    pool = pooled_variance([_means(own) for own in together]) if together else None
    return {name: _estimate(own, None if name in apart else pool) for name, own in several.items()}


def pooled_variance(arms: Sequence[Mapping[int, float]]) -> tuple[float, float]:
    """Variance over seeds of one arm's difference, and its degrees of freedom, from the differences
    by seed of several arms. Arms may have all, some or none of their seeds in common."""
    centred = [
        {seed: value - float(np.mean(list(own.values()))) for seed, value in own.items()}
        for own in arms
    ]
    degrees = sum(len(own) - 1.0 for own in centred)
    variance = sum(value**2 for own in centred for value in own.values()) / degrees
    # What a seed's arms have in common adds to the products of two arms' deviations, each shared
    # seed as often as centring leaves it. In this many degrees of freedom arms repeat each other.
    products, repeated = 0.0, 0.0
    for one, other in itertools.permutations(centred, 2):
        shared = one.keys() & other.keys()
        products += sum(one[seed] * other[seed] for seed in shared)
        share = len(shared) / len(one), len(shared) / len(other)
        repeated += len(shared) - share[0] - share[1] + share[0] * share[1]
    common = products / repeated if repeated else 0.0
    correlation = min(abs(common) / variance, 1.0) if variance else 1.0
    return variance, degrees / (1 + correlation**2 * repeated / degrees)


def adjusted(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's correction (1979) over all tests."""
    return dict(zip(p_values, holm(list(p_values.values())), strict=True))


def _means(values: Mapping[int, Value]) -> dict[int, float]:
    return {seed: value.mean for seed, value in values.items()}


def _estimate(by_seed: Mapping[int, Value], pool: tuple[float, float] | None) -> Estimate:
    """``pool`` is the pooled variance and its degrees of freedom; None for an arm outside it."""
    values = list(by_seed.values())
    row = np.array([value.mean for value in values])
    mean = float(row.mean())
    pooled, degrees = pool or (0.0, len(row) - 1.0)
    parts = [(max(pooled, float(row.var(ddof=1))) / len(row), degrees)]
    if items := _item_part(values):
        parts.append(items)
    of_latents = [(float(np.mean([value.variance for value in values])) / len(row), np.inf)]
    if documents := _document_part(values):
        parts.append(documents)
        of_latents.append(documents)
    over_seeds, over_latents = _joined(parts), _joined(of_latents)
    tests = [_tested(mean, *one, _means(by_seed)) for one in (over_seeds, over_latents)]
    wider = max(tests, key=lambda test: test.interval[1] - test.interval[0])
    return replace(wider, p=max(test.p for test in tests))


def _tested(mean: float, squared: float, degrees: float, by_seed: dict[int, float]) -> Estimate:
    """The t-test of a mean with that squared error."""
    error = float(np.sqrt(squared))
    half = float(special.stdtrit(degrees, (1 + LEVEL) / 2)) * error
    certain = 0.0 if mean else 1.0
    p = 2 * float(special.stdtr(degrees, -abs(mean) / error)) if error > 0 else certain
    return Estimate(mean, (mean - half, mean + half), p, error, degrees, by_seed)


def _item_part(values: Sequence[Value]) -> tuple[float, float] | None:
    """Squared error added by the choice of items that all seeds share (families of concepts,
    planted features), and its degrees of freedom."""
    items = [value.items for value in values if value.items is not None]
    if len(items) < len(values):
        return None
    names = [name for name in items[0] if all(name in own for own in items)]
    table = np.array([[own[name] for name in names] for own in items])
    seeds, count = table.shape
    if count < 2:
        return None
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    noise = (rest**2).sum() / ((seeds - 1) * (count - 1))
    squared = (table.mean(0).var(ddof=1) - noise / seeds) / count
    return max(0.0, float(squared)), count - 1.0


def _document_part(values: Sequence[Value]) -> tuple[float, float] | None:
    """Squared error added by the choice of documents that all seeds share, and its degrees of
    freedom."""
    drawn = [value.resampled for value in values if value.resampled is not None]
    if len(drawn) < len(values):
        return None
    table = np.array(drawn, dtype=float)  # [seeds, resamplings]
    table = table[:, ~np.isnan(table).any(0)]
    if table.shape[1] < 2:
        return None
    of_mean = table.mean(0).var(ddof=1)
    # What each seed's text adds to that seed alone is in the spread over seeds already.
    alone = (table.var(1, ddof=1).mean() - of_mean) / (len(table) - 1)
    return max(0.0, float(of_mean - alone)), table.shape[1] - 1.0


def _joined(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Sum of variances, and its degrees of freedom after Satterthwaite."""
    total = float(sum(variance for variance, _ in parts))
    spread = float(sum(variance**2 / degrees for variance, degrees in parts))
    return total, total**2 / spread if spread > 0 else parts[0][1]
