"""Means over latents and over concepts, with 95 % intervals.

Concepts come in families of very different size (first letters of words are two thirds of them),
and what happens to one letter happens to the others. So a mean over concepts is the mean of its
families' means, and its interval is a t-interval over families: they are the sample.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import special
from torch import Tensor

from llm_wsae.statistics.uncertainty import LEVEL, Bootstrap, Interval


@dataclass(frozen=True)
class Mean:
    """A mean over the latents, or concepts, that have the score."""

    mean: float
    interval: Interval
    """Its 95 % interval: by resampling latents, or over families of concepts."""
    count: int
    share: float
    """``count`` as a share of all latents, or of all concepts."""


@dataclass(frozen=True)
class ConceptSummary:
    """Scores of a dictionary on concepts, averaged and one by one."""

    means: dict[str, Mean]
    """Every family counted once."""
    families: dict[str, dict[str, float]]
    """The same means within each family."""
    concepts: dict[str, dict[str, float]]
    """The same numbers for each concept."""


def mean_of(values: Float[Tensor, " items"], bootstrap: Bootstrap, total: int) -> Mean:
    """Mean and interval of the values that are not NaN, out of ``total`` latents or concepts.

    ``bootstrap`` resamples the items.
    """
    there = ~values.isnan()
    count = int(there.sum())
    if not count:
        return Mean(float("nan"), (float("nan"), float("nan")), 0, 0.0)
    sums = {
        "sum": values.where(there, 0.0).double().numpy(),
        "count": there.double().numpy(),
    }
    return Mean(
        float(values[there].double().mean()),
        bootstrap.interval(lambda drawn: drawn["sum"] / drawn["count"], sums),
        count,
        count / total,
    )


def mean_of_families(values: Float[Tensor, " concepts"], families: Sequence[str]) -> Mean:
    """Mean over families of the mean of their concepts that are not NaN.

    The interval is Student's over the families; over the concepts where there is one family only,
    NaN where there is one concept.
    """
    there = ~values.isnan()
    known = [family for family, one in zip(families, there.tolist(), strict=True) if one]
    parts = values[there].double().numpy()
    if len(set(known)) > 1:
        parts = np.array([_of_family(parts, known, family) for family in dict.fromkeys(known)])
    if not len(parts):
        return Mean(float("nan"), (float("nan"), float("nan")), 0, 0.0)
    mean, half = float(parts.mean()), float("nan")
    if len(parts) > 1:
        error = float(parts.std(ddof=1)) / math.sqrt(len(parts))
        half = float(special.stdtrit(len(parts) - 1, (1 + LEVEL) / 2)) * error
    return Mean(mean, (mean - half, mean + half), len(known), len(known) / len(values))


def _of_family(values: np.ndarray, families: Sequence[str], family: str) -> float:
    return float(values[np.array([one == family for one in families])].mean())


def latent_means(
    scores: dict[str, Float[Tensor, " d_sae"]],
    eligible: Bool[Tensor, " d_sae"],
    resampled: Float[Tensor, "d_sae documents"],
    resamplings: int,
    seed: int,
) -> dict[str, Mean]:
    """Means of every score over the eligible latents.

    The interval of detection also covers the choice of documents: ``resampled`` is each latent's
    detection on resamplings of them.
    """
    bootstrap = Bootstrap(max(int(eligible.sum()), 1), resamplings, seed)
    total = len(eligible)
    found = {name: mean_of(values[eligible], bootstrap, total) for name, values in scores.items()}
    one = found["detection"]
    values = scores["detection"][eligible]
    values = values[~values.isnan()]
    drawn = resampled[eligible].nanmean(0)
    drawn = drawn[~drawn.isnan()]  # one may lack the documents of every latent
    known = len(values) > 1 and len(drawn) > 1
    squared = float(drawn.var() + values.var() / len(values)) if known else math.nan
    half = float(special.ndtri((1 + LEVEL) / 2)) * math.sqrt(squared)
    found["detection"] = replace(one, interval=(one.mean - half, one.mean + half))
    return found


def summarise(
    names: Sequence[str], families: Sequence[str], columns: Mapping[str, Float[Tensor, " concepts"]]
) -> ConceptSummary:
    """Means over all families and over each of them."""
    of_families = {}
    for family in dict.fromkeys(families):
        mine = torch.tensor([one == family for one in families])
        of_families[family] = {
            key: float(values[mine].nanmean()) for key, values in columns.items()
        }
    return ConceptSummary(
        {key: mean_of_families(values, families) for key, values in columns.items()},
        of_families,
        {
            name: {key: float(values[number]) for key, values in columns.items()}
            for number, name in enumerate(names)
        },
    )
