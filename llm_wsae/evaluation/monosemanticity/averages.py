"""Means over latents and over concepts, with 95 % intervals.

Concepts come in families of very different size (first letters of words are two thirds of them),
and what happens to one letter happens to the others. So a mean over concepts is the mean of its
families' means, and its interval is a t-interval over families: they are the sample.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import special
from torch import Tensor

from llm_wsae.evaluation.monosemanticity.concept_scores import LatentProbes, SiteProbes
from llm_wsae.evaluation.monosemanticity.probing import PROBE_SIZES
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
    """Every family counted once. ``best_1``, ``best_2``, ``best_5``: area under the ROC curve of
    sparse probes;
    ``selectivity``, ``own_fall``, ``others_fall``: drops in the dense probes' accuracy;
    ``spill``, what others lose at a matched own drop; ``density`` of the removed latents; of first
    letters alone, over letters, ``missed`` and ``absorbed``."""
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


def summarise_concepts(
    names: list[str], families: list[str], probes: LatentProbes
) -> ConceptSummary:
    """Means over all families and over each of them."""
    columns = {f"best_{size}": probes.sparse[size] for size in PROBE_SIZES}
    columns |= {
        "selectivity": probes.selectivity,
        "own_fall": probes.own_fall,
        "others_fall": probes.others_fall,
        "density": probes.density,
        "spill": probes.spill,
        "missed": probes.missed,
        "absorbed": probes.absorbed,
    }
    return ConceptSummary(
        {name: mean_of_families(values, families) for name, values in columns.items()},
        _family_means(families, columns),
        _by_concept(names, columns),
    )


def summarise_site(names: list[str], families: list[str], probes: SiteProbes) -> dict[str, Any]:
    """What ``MonosemanticReport.sites`` holds for a site."""
    columns = {"dense": probes.dense, "accuracy": probes.accuracy}
    columns |= {f"best_{size}": probes.raw[size] for size in PROBE_SIZES}
    return {
        "means": {name: mean_of_families(v, families).mean for name, v in columns.items()},
        "families": _family_means(families, columns),
        "concepts": _by_concept(names, columns),
    }


def _family_means(
    families: list[str], columns: dict[str, Float[Tensor, " concepts"]]
) -> dict[str, dict[str, float]]:
    found = {}
    for family in dict.fromkeys(families):
        mine = torch.tensor([one == family for one in families])
        found[family] = {name: float(values[mine].nanmean()) for name, values in columns.items()}
    return found


def _by_concept(
    names: list[str], columns: dict[str, Float[Tensor, " concepts"]]
) -> dict[str, dict[str, float]]:
    return {
        concept: {name: float(values[i]) for name, values in columns.items()}
        for i, concept in enumerate(names)
    }
