"""How well a dictionary's latents stand for concepts: sparse probing and selectivity.

Concepts of tokens and concepts of documents are tested on different units, but scored in the same
way and reported together: when a concept's latents are removed, the drops of all other concepts
count, of both kinds. What does not depend on a dictionary (dense probes, the best raw dimensions)
is computed once per site.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_wsae.evaluation.monosemanticity.absorption import absorption, main_latents
from llm_wsae.evaluation.monosemanticity.concepts import Concepts
from llm_wsae.evaluation.monosemanticity.probing import (
    PROBE_SIZES,
    SelectedColumns,
    Split,
    best_columns,
    correlations,
    dense_probes,
    sparse_probes,
    splits,
)
from llm_wsae.evaluation.monosemanticity.removal import (
    DenseProbeScores,
    falls,
    selectivity,
    spill,
)
from llm_wsae.evaluation.monosemanticity.unit_tables import (
    DenseTable,
    SparseTable,
    Table,
    Units,
)
from llm_wsae.statistics.measures import LETTER

HALVES = 2


@dataclass(frozen=True)
class ProbedConcepts:
    """The concepts of one kind of units, with their splits into training and test units."""

    units: Units
    concepts: Concepts
    splits: list[Split]

    @classmethod
    def of(cls, units: Units, concepts: Concepts, seed: int) -> "ProbedConcepts":
        """Split both halves."""
        return cls(units, concepts, splits(concepts, seed))


@dataclass(frozen=True)
class SiteProbes:
    """Probes of a site's activations, which do not depend on a dictionary."""

    directions: list[list[Tensor]]
    """Of the dense probes, per kind of units and half: [d_in, concepts]."""
    scores: list[list[Tensor]]
    """Per kind of units and half, the dense probes' scores of the test units."""
    dense: Float[Tensor, " concepts"]
    """Area under the ROC curve of probes on all dimensions: the ceiling."""
    accuracy: Float[Tensor, " concepts"]
    """Their accuracy, averaged over both classes."""
    raw: dict[int, Float[Tensor, " concepts"]]
    """By number of dimensions, the area under the ROC curve of probes on the best ones: the
    floor."""


@dataclass(frozen=True)
class LatentTables:
    """The latents of one dictionary on the units of all concepts."""

    tables: Sequence[Table]
    """Their activations, per kind of units."""
    correlations: list[list[Tensor]]
    """With every concept, per kind of units and half: [concepts, d_sae]."""
    decoder: Float[Tensor, "d_sae d_in"]
    density: Float[Tensor, " d_sae"]

    @classmethod
    def of(
        cls,
        concepts: Sequence[ProbedConcepts],
        tables: Sequence[Table],
        decoder: Float[Tensor, "d_sae d_in"],
        density: Float[Tensor, " d_sae"],
    ) -> "LatentTables":
        """Correlate the latents with the concepts."""
        return cls(tables, _correlations(concepts, tables), decoder, density)


@dataclass(frozen=True)
class LatentProbes:
    """Scores of one dictionary's latents, per concept."""

    sparse: dict[int, Float[Tensor, " concepts"]]
    """By number of latents, the area under the ROC curve of probes on the best ones."""
    own_fall: Float[Tensor, " concepts"]
    """Drop of the dense probe's accuracy when the concept's best latents are removed."""
    others_fall: Float[Tensor, " concepts"]
    """Mean drop of the other concepts' dense probes."""
    density: Float[Tensor, " concepts"]
    """Mean density of the removed latents."""
    missed: Float[Tensor, " concepts"]
    """Share of the examples on which the concept's main latents are silent (``absorption``); NaN
    unless the concept is a first letter."""
    absorbed: Float[Tensor, " concepts"]
    """Share on which, in addition, one other latent speaks for the letter."""
    spill: Float[Tensor, " concepts"]
    """Mean drop of the other concepts that are hit hardest, at the matched own drop; NaN for a
    concept whose own drop does not reach that far."""

    @property
    def selectivity(self) -> Float[Tensor, " concepts"]:
        """Own drop minus the others'."""
        return self.own_fall - self.others_fall


def probe_site(
    concepts: Sequence[ProbedConcepts], x: Sequence[Float[Tensor, "_ d_in"]]
) -> SiteProbes:
    """Dense probes, and probes on the best dimensions, of each kind of units' activations ``x``."""
    directions, scores, dense, accuracy = [], [], [], []
    x = [rows - rows.mean(0) for rows in x]  # keeps the digits of dimensions far from 0
    for asked, rows in zip(concepts, x, strict=True):
        probes = [dense_probes(rows, split) for split in asked.splits]
        found = [p.scores(rows, split) for p, split in zip(probes, asked.splits, strict=True)]
        directions.append([one.directions for one in probes])
        scores.append(found)
        dense.append(_mean_of_halves(s.test(v) for s, v in zip(asked.splits, found, strict=True)))
        accuracy.append(
            _mean_of_halves(s.accuracy(v) for s, v in zip(asked.splits, found, strict=True))
        )
    tables = [DenseTable(rows) for rows in x]
    every = torch.ones(x[0].shape[1] if x else 0, dtype=torch.bool)
    raw = _sparse(concepts, tables, _correlations(concepts, tables), every)
    return SiteProbes(directions, scores, _joined(dense), _joined(accuracy), raw)


def probe_latents(
    concepts: Sequence[ProbedConcepts],
    site: SiteProbes,
    latents: LatentTables,
    allowed: Bool[Tensor, " d_sae"],
) -> LatentProbes:
    """Sparse probing and selectivity with the ``allowed`` latents."""
    total: dict[int, list[Tensor]] = {size: [] for size in PROBE_SIZES}
    densities = []
    for half in range(HALVES):
        # Only latents that fire for the concept: removing others would strengthen it.
        removed = [
            best_columns(of[half].where(of[half] > 0, -torch.inf), allowed, PROBE_SIZES[-1])
            for of in latents.correlations
        ]
        sets = torch.cat(removed) if removed else torch.zeros(0, PROBE_SIZES[-1], dtype=torch.long)
        there = sets >= 0
        densities.append((latents.density[sets] * there).sum(1) / there.sum(1).clamp(min=1))
        probed = [
            DenseProbeScores(
                table, site.directions[kind][half], asked.splits[half], site.scores[kind][half]
            )
            for kind, (table, asked) in enumerate(zip(latents.tables, concepts, strict=True))
        ]
        for size in PROBE_SIZES:
            found = [falls(sets[:, :size], latents.decoder, one) for one in probed]
            empty = torch.zeros(0, 0, dtype=torch.float64)
            total[size].append(torch.cat(found, 1) if found else empty)
    by_size = {size: _mean_of_halves(of_halves) for size, of_halves in total.items()}
    own, others = selectivity(by_size[PROBE_SIZES[-1]])
    sparse = _sparse(concepts, latents.tables, latents.correlations, allowed)
    missed, absorbed = _absorption(concepts, site, latents, allowed, sparse)
    density = _mean_of_halves(densities)
    return LatentProbes(sparse, own, others, density, missed, absorbed, spill(by_size))


def _absorption(
    concepts: Sequence[ProbedConcepts],
    site: SiteProbes,
    latents: LatentTables,
    allowed: Tensor,
    sparse: Mapping[int, Tensor],
) -> tuple[Tensor, Tensor]:
    """What is missed and absorbed of every concept, mean of both halves; NaN where it is not
    asked: of concepts that are not letters."""
    sides: list[list[Tensor]] = [[], []]
    start = 0
    for kind, (table, asked) in enumerate(zip(latents.tables, concepts, strict=True)):
        names = asked.concepts.families
        area = {size: values[start : start + len(names)] for size, values in sparse.items()}
        start += len(names)
        letters = torch.tensor([family == LETTER for family in names])
        found = torch.full((HALVES, 2, len(names)), torch.nan, dtype=torch.float64)
        if isinstance(table, SparseTable) and bool(letters.any()):
            for half, split in enumerate(asked.splits):
                main = main_latents(latents.correlations[kind][half], area, allowed)
                own = split.of(letters)
                directions = site.directions[kind][half][:, letters]
                scores = site.scores[kind][half][letters]
                parts = absorption(
                    main[letters], allowed, table, latents.decoder, directions, scores, own
                )
                found[half][:, letters] = torch.stack(parts)
        for side, values in zip(sides, _mean_of_halves(found), strict=True):
            side.append(values)
    return _joined(sides[0]), _joined(sides[1])


def _correlations(
    concepts: Sequence[ProbedConcepts], tables: Sequence[Table]
) -> list[list[Tensor]]:
    return [
        [correlations(table, split) for split in asked.splits]
        for table, asked in zip(tables, concepts, strict=True)
    ]


def _sparse(
    concepts: Sequence[ProbedConcepts],
    tables: Sequence[Table],
    correlated: list[list[Tensor]],
    allowed: Tensor,
) -> dict[int, Tensor]:
    """Area under the ROC curve of probes on the best 1, 2 and 5 columns, mean of both halves."""
    found: dict[int, list[Tensor]] = {size: [] for size in PROBE_SIZES}
    for table, asked, of_halves in zip(tables, concepts, correlated, strict=True):
        chosen = [best_columns(one.abs(), allowed, PROBE_SIZES[-1]) for one in of_halves]
        taken = [SelectedColumns.of(table, columns) for columns in chosen]
        for size in PROBE_SIZES:
            pairs = zip(taken, asked.splits, strict=True)
            found[size].append(
                _mean_of_halves(sparse_probes(one, split, size) for one, split in pairs)
            )
    return {size: _joined(parts) for size, parts in found.items()}


def _mean_of_halves(of_halves: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(of_halves)).mean(0)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
