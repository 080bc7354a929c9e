"""Is a difference more than chance? Intervals over seeds, documents, and concepts or plants.

A difference is measured once per seed, and seeds are few: a percentile bootstrap over three of them
covers the truth in about 80 % of cases, not 95 %. Instead the squared errors of the mean are added
up, each with its degrees of freedom (Satterthwaite 1946), and a t-test is made of their sum:

* Over seeds: the variance of the seeds' differences. It contains the choice of latents.
* Over families of concepts, letters or planted features, which all dictionaries share: the variance
  of their differences, means over seeds (crossed random effects, Clark 1973). Concepts of one
  family depend on each other, so families count; plants are drawn independently, and count alone.
* Over documents, which all dictionaries share: the variance over resamplings of them (bootstrap,
  Efron 1979). KL is known for each document, so its error is that of a ratio of sums.

What differs from seed to seed in one family or document counts twice, since it is in the spread
over seeds as well. So intervals err on the wide side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import special

from llm_wsae.statistics.uncertainty import LEVEL

_Part = tuple[float, float]  # a squared error of a mean, and its degrees of freedom


@dataclass(frozen=True)
class Value:
    """One measure of one dictionary, or the difference of two."""

    mean: float
    items: Mapping[str, float] | None = None
    """The parts of a mean over families of concepts, letters or planted features, by name."""
    resampled: Sequence[float | None] | None = None
    """The mean on resamplings of the text's documents, the same ones for all dictionaries; None, or
    NaN in a difference, on one that lacks the documents of every latent."""
    documents: Sequence[float] | None = None
    """Sums over the predictions of each document, of a measure whose differences are shares."""

    def less(self, other: "Value") -> "Value | None":
        """This one less the other, over the items that both have; None if they share none."""
        mean, items, resampled = self.mean - other.mean, None, None
        if self.items is not None and other.items is not None:
            items = {n: v - other.items[n] for n, v in self.items.items() if n in other.items}
            if not items:
                return None
            mean = sum(items.values()) / len(items)
        if self.resampled is not None and other.resampled is not None:
            own, others = (np.array(one.resampled, dtype=float) for one in (self, other))
            resampled = tuple((own - others).tolist())
        return Value(mean, items, resampled)


@dataclass(frozen=True)
class Estimate:
    """A mean difference."""

    difference: float
    interval: tuple[float, float]  # 95 %, for this difference alone
    p: float  # of no difference, two-sided, for this difference alone
    by_seed: dict[int, float]


def compared(own: Mapping[int, Value], other: Mapping[int, Value]) -> Estimate | None:
    """The difference of two kinds of dictionaries, whose values are given by seed. None unless two
    seeds have both. Of a measure that is known for each document the difference is a share: 0.1
    where it is a tenth more."""
    seeds = sorted(own.keys() & other.keys())
    if any(one[seed].documents is not None for one in (own, other) for seed in seeds):
        tables = [[one[seed].documents or () for seed in seeds] for one in (own, other)]
        if len(seeds) < 2 or any(len(sums) < 2 for table in tables for sums in table):
            return None
        ratios, of_documents = _crossed_ratio(*(np.array(table, dtype=float) for table in tables))
        return _estimate(dict(zip(seeds, ratios.tolist(), strict=True)), [of_documents])
    differences = {seed: own[seed].less(other[seed]) for seed in seeds}
    there = {seed: value for seed, value in differences.items() if value is not None}
    if len(there) < 2:
        return None
    parts = (_item_part([*there.values()]), _document_part([*there.values()]))
    by_seed = {seed: value.mean for seed, value in there.items()}
    return _estimate(by_seed, [part for part in parts if part is not None])


def _crossed_ratio(
    own: Float[np.ndarray, "seeds items"], other: Float[np.ndarray, "seeds items"]
) -> tuple[Float[np.ndarray, " seeds"], tuple[float, float]]:
    """By seed, how much more the sum of one is than that of the other, as a share; and what the
    choice of items adds to the squared error of their mean, with its degrees of freedom.

    Items (documents) are the same in every seed, so both are crossed: the variance over items, of
    the mean over seeds, is that of a ratio of sums (delta method).
    """
    items = own.shape[1]
    ratios = own.sum(1) / other.sum(1) - 1
    scale = other.sum(1, keepdims=True) / items
    residuals = ((own - (1 + ratios[:, None]) * other) / scale).mean(0)
    return ratios, (float(residuals.var(ddof=1)) / items, items - 1.0)


def _estimate(by_seed: dict[int, float], parts: Sequence[_Part]) -> Estimate:
    """The t-test of the mean of two seeds or more, with errors beside that over seeds."""
    row = np.array(list(by_seed.values()))
    mean = float(row.mean())
    parts = [(float(row.var(ddof=1)) / len(row), len(row) - 1.0), *parts]
    squared = float(sum(part for part, _ in parts))
    spread = float(sum(part**2 / degrees for part, degrees in parts))
    degrees = squared**2 / spread if spread > 0 else parts[0][1]
    error = float(np.sqrt(squared))
    half = float(special.stdtrit(degrees, (1 + LEVEL) / 2)) * error
    certain = 0.0 if mean else 1.0
    p = 2 * float(special.stdtr(degrees, -abs(mean) / error)) if error > 0 else certain
    return Estimate(mean, (mean - half, mean + half), p, by_seed)


def _item_part(values: Sequence[Value]) -> _Part | None:
    """What the choice of items adds that all seeds share."""
    items = [value.items for value in values if value.items is not None]
    if len(items) < len(values):
        return None
    names = [name for name in items[0] if all(name in own for own in items)]
    if len(names) < 2:
        return None
    means = np.array([[own[name] for name in names] for own in items]).mean(0)
    return float(means.var(ddof=1)) / len(names), len(names) - 1.0


def _document_part(values: Sequence[Value]) -> _Part | None:
    """What the choice of documents adds that all seeds share."""
    drawn = [value.resampled for value in values if value.resampled is not None]
    if len(drawn) < len(values):
        return None
    table = np.array(drawn, dtype=float)  # [seeds, resamplings]
    table = table[:, ~np.isnan(table).any(0)]
    if table.shape[1] < 2:
        return None
    return float(table.mean(0).var(ddof=1)), table.shape[1] - 1.0
