"""How well a dictionary's latents stand for concepts: sparse probing, selectivity, absorption.

Concepts of tokens and concepts of documents are tested on different units, but scored in the same
way and reported together: when a concept's latents are removed, the drops of all other concepts
count, of both kinds. What does not depend on a dictionary (dense probes, the best raw dimensions)
is computed once per site.

A table holds a number for each column (latent or dimension) and unit: [columns, units], sparse or
dense.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_wsae.evaluation.monosemanticity.absorption import absorption
from llm_wsae.evaluation.monosemanticity.concepts import Concepts, Units
from llm_wsae.evaluation.monosemanticity.probing import (
    PROBE_SIZES,
    Exam,
    SelectedColumns,
    Split,
    accuracy,
    best_columns,
    correlations,
    dense_probes,
    sparse_probes,
)
from llm_wsae.evaluation.monosemanticity.removal import falls, selectivity, spill

HALVES = 2
_BEST = [f"best_{size}" for size in PROBE_SIZES]
Columns = dict[str, Float[Tensor, " concepts"]]
"""Scores by name, each with a number for every concept."""


class ProbedConcepts(NamedTuple):
    """The concepts of one kind of units."""

    units: Units
    concepts: Concepts
    splits: list[Split]
    """Both halves of the documents as training units."""


class SiteProbes(NamedTuple):
    """Probes of a site's activations, which do not depend on a dictionary."""

    halves: list[list[Exam]]
    """By half and kind of units."""
    columns: Columns
    """Area under the ROC curve of probes on all dimensions (``dense``) and on the best ones
    (``best_1``, ``best_2``, ``best_5``), and the ``accuracy`` of the dense probes."""


def probe_site(
    concepts: Sequence[ProbedConcepts], x: Sequence[Float[Tensor, "_ d_in"]]
) -> SiteProbes:
    """Dense probes, and probes on the best dimensions, of each kind of units' activations ``x``."""
    x = [rows - rows.mean(0) for rows in x]  # keeps the digits of dimensions far from 0
    halves = [
        [_exam(asked, rows, half) for asked, rows in zip(concepts, x, strict=True)]
        for half in range(HALVES)
    ]
    tables = [rows.T for rows in x]
    every = torch.ones(x[0].shape[1] if x else 0, dtype=torch.bool)
    dense = _over_halves([[e.split.test(e.scores) for e in exams] for exams in halves])
    accurate = [
        [accuracy(e.scores, e.split.counts, e.split.num_examples) for e in exams]
        for exams in halves
    ]
    best = _sparse(halves, tables, _correlated(halves, tables), every)
    columns = {"dense": dense, "accuracy": _over_halves(accurate)}
    return SiteProbes(halves, columns | dict(zip(_BEST, best, strict=True)))


def _exam(asked: ProbedConcepts, x: Tensor, half: int) -> Exam:
    split = asked.splits[half]
    return Exam(asked.concepts.families, split, *dense_probes(x, split))


def probe_latents(
    site: SiteProbes,
    tables: Sequence[Tensor],
    decoder: Float[Tensor, "d_sae d_in"],
    density: Float[Tensor, " d_sae"],
    allowed: Sequence[Bool[Tensor, " d_sae"]],
) -> list[Columns]:
    """Scores of the latents, for each choice of ``allowed`` ones.

    ``best_1``, ``best_2``, ``best_5``: area under the ROC curve of sparse probes; ``own_fall``,
    ``others_fall``: drop of the dense probes' accuracy when a concept's best five latents are
    removed, and ``selectivity``, their difference; ``density`` of the removed latents; ``spill``;
    ``missed`` and ``absorbed``, NaN unless the concept is a first letter.
    """
    correlated = _correlated(site.halves, tables)
    return [_scores(site.halves, tables, correlated, decoder, density, one) for one in allowed]


def _scores(
    halves: list[list[Exam]],
    tables: Sequence[Tensor],
    correlated: list[list[Tensor]],
    decoder: Tensor,
    density: Tensor,
    allowed: Tensor,
) -> Columns:
    best = _sparse(halves, tables, correlated, allowed)
    areas = best.split([len(exam.families) for exam in halves[0]], 1)
    drops: dict[int, list[list[Tensor]]] = {size: [] for size in PROBE_SIZES}
    densities, absorbed = [], []
    for exams, own in zip(halves, correlated, strict=True):
        # Only latents that fire for the concept: removing others would strengthen it.
        removed = [
            best_columns(one.where(one > 0, -torch.inf), allowed, PROBE_SIZES[-1]) for one in own
        ]
        sets = torch.cat([torch.zeros(0, PROBE_SIZES[-1], dtype=torch.long), *removed])
        there = sets >= 0
        densities.append([(density[sets] * there).sum(1) / there.sum(1).clamp(min=1)])
        for size, found in drops.items():
            pairs = zip(exams, tables, strict=True)
            found.append([falls(sets[:, :size], decoder, *pair) for pair in pairs])
        parts = zip(exams, tables, own, areas, strict=True)
        absorbed.append([absorption(*part, allowed, decoder) for part in parts])
    by_size = {size: _over_halves(found, best.shape[1]) for size, found in drops.items()}
    own_fall, others_fall = selectivity(by_size[PROBE_SIZES[-1]])
    missed, taken = _over_halves(absorbed, 2)
    return dict(zip(_BEST, best, strict=True)) | {
        "selectivity": own_fall - others_fall,
        "own_fall": own_fall,
        "others_fall": others_fall,
        "density": _over_halves(densities),
        "spill": spill(by_size),
        "missed": missed,
        "absorbed": taken,
    }


def _correlated(halves: list[list[Exam]], tables: Sequence[Tensor]) -> list[list[Tensor]]:
    """Correlations of all columns with all concepts, by half and kind."""
    return [
        [correlations(table, e.split) for table, e in zip(tables, exams, strict=True)]
        for exams in halves
    ]


def _sparse(
    halves: list[list[Exam]],
    tables: Sequence[Tensor],
    correlated: list[list[Tensor]],
    allowed: Tensor,
) -> Float[Tensor, "sizes concepts"]:
    """Area under the ROC curve of probes on the best 1, 2 and 5 columns, mean of both halves."""
    found = []
    for exams, own in zip(halves, correlated, strict=True):
        parts = []
        for exam, table, one in zip(exams, tables, own, strict=True):
            chosen = best_columns(one.abs(), allowed, PROBE_SIZES[-1])
            taken = SelectedColumns.of(table, chosen)
            sizes = [sparse_probes(taken, exam.split, size) for size in PROBE_SIZES]
            parts.append(torch.stack(sizes))
        found.append(parts)
    return _over_halves(found, len(PROBE_SIZES))


def _over_halves(found: list[list[Tensor]], rows: int | None = None) -> Tensor:
    """Numbers by half and kind, [concepts] or [rows, concepts], joined over kinds; the mean of both
    halves."""
    shape = (0,) if rows is None else (rows, 0)
    nothing = torch.zeros(shape, dtype=torch.float64)
    return torch.stack([torch.cat([nothing, *parts], -1) for parts in found]).mean(0)
