"""How well a dictionary's latents stand for concepts: probing and selectivity, table by table.

The concepts of tokens and those of documents are asked of different units, but are scored alike
and reported together; when a concept's latents are removed, the falls of all others count, of both
kinds. Whatever does not depend on a dictionary (dense probes, the best raw dimensions) is computed
once per site.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_wsae.evaluation.monosemanticity.concepts import Concepts
from llm_wsae.evaluation.monosemanticity.probe_tables import DenseTable, Table, Units
from llm_wsae.evaluation.monosemanticity.probing import (
    PROBE_SIZES,
    Split,
    Taken,
    best_columns,
    correlations,
    dense_probes,
    sparse_probes,
    splits,
)
from llm_wsae.evaluation.monosemanticity.selectivity import Probed, falls, selectivity

HALVES = 2


@dataclass(frozen=True)
class Questions:
    """Concepts of one kind of units."""

    units: Units
    concepts: Concepts
    splits: list[Split]

    @classmethod
    def of(cls, units: Units, concepts: Concepts, seed: int) -> "Questions":
        """Prepare both halves."""
        return cls(units, concepts, splits(concepts, seed))


@dataclass(frozen=True)
class SiteProbes:
    """What does not depend on a dictionary."""

    directions: list[list[Tensor]]
    """Of the dense probes, per kind of units and half: [d_in, concepts]."""
    scores: list[list[Tensor]]
    """Per kind of units and half, what the dense probes give to the units tested on."""
    dense: Float[Tensor, " concepts"]
    """How well probes of all dimensions do: the ceiling."""
    accuracy: Float[Tensor, " concepts"]
    """Share that they get right, averaged over both classes."""
    raw: dict[int, Float[Tensor, " concepts"]]
    """How well probes of the best so many dimensions do: the floor."""


@dataclass(frozen=True)
class Latents:
    """The latents of one dictionary, as concepts are asked of them."""

    tables: Sequence[Table]
    """Their activations, per kind of units."""
    correlations: list[list[Tensor]]
    """With every concept, per kind of units and half: [concepts, d_sae]."""
    decoder: Float[Tensor, "d_sae d_in"]
    density: Float[Tensor, " d_sae"]

    @classmethod
    def of(
        cls,
        questions: Sequence[Questions],
        tables: Sequence[Table],
        decoder: Float[Tensor, "d_sae d_in"],
        density: Float[Tensor, " d_sae"],
    ) -> "Latents":
        """Correlate them with the concepts."""
        return cls(tables, _correlations(questions, tables), decoder, density)


@dataclass(frozen=True)
class LatentProbes:
    """What was found with the latents of one dictionary, per concept."""

    sparse: dict[int, Float[Tensor, " concepts"]]
    """How well probes of the best so many latents do."""
    own_fall: Float[Tensor, " concepts"]
    """Fall of the dense probe's accuracy when the concept's best latents are removed."""
    others_fall: Float[Tensor, " concepts"]
    """Mean fall of the other concepts' dense probes."""
    density: Float[Tensor, " concepts"]
    """Mean density of the removed latents."""

    @property
    def selectivity(self) -> Float[Tensor, " concepts"]:
        """Own fall minus the others'."""
        return self.own_fall - self.others_fall


def probe_site(questions: Sequence[Questions], x: Sequence[Float[Tensor, "_ d_in"]]) -> SiteProbes:
    """Dense probes and best dimensions of the activations of each kind of units."""
    directions, scores, dense, accuracy = [], [], [], []
    x = [rows - rows.mean(0) for rows in x]  # the digits of dimensions that are far from 0
    for asked, rows in zip(questions, x, strict=True):
        probes = [dense_probes(rows, split) for split in asked.splits]
        found = [p.scores(rows, split) for p, split in zip(probes, asked.splits, strict=True)]
        directions.append([one.directions for one in probes])
        scores.append(found)
        dense.append(_mean(s.test(v) for s, v in zip(asked.splits, found, strict=True)))
        accuracy.append(_mean(s.accuracy(v) for s, v in zip(asked.splits, found, strict=True)))
    tables = [DenseTable(rows) for rows in x]
    every = torch.ones(x[0].shape[1] if x else 0, dtype=torch.bool)
    raw = _sparse(questions, tables, _correlations(questions, tables), every)
    return SiteProbes(directions, scores, _joined(dense), _joined(accuracy), raw)


def probe_latents(
    questions: Sequence[Questions],
    site: SiteProbes,
    latents: Latents,
    allowed: Bool[Tensor, " d_sae"],
) -> LatentProbes:
    """Probing and selectivity with the ``allowed`` latents."""
    total, densities = [], []
    for half in range(HALVES):
        # Only latents that fire for the concept: removing others would add to it.
        removed = [
            best_columns(of[half].where(of[half] > 0, -torch.inf), allowed, PROBE_SIZES[-1])
            for of in latents.correlations
        ]
        sets = torch.cat(removed) if removed else torch.zeros(0, PROBE_SIZES[-1], dtype=torch.long)
        there = sets >= 0
        densities.append((latents.density[sets] * there).sum(1) / there.sum(1).clamp(min=1))
        found = [
            falls(
                sets,
                latents.decoder,
                Probed(
                    table, site.directions[kind][half], asked.splits[half], site.scores[kind][half]
                ),
            )
            for kind, (table, asked) in enumerate(zip(latents.tables, questions, strict=True))
        ]
        total.append(torch.cat(found, 1) if found else torch.zeros(0, 0, dtype=torch.float64))
    own, others = selectivity(_mean(total))
    sparse = _sparse(questions, latents.tables, latents.correlations, allowed)
    return LatentProbes(sparse, own, others, _mean(densities))


def _correlations(questions: Sequence[Questions], tables: Sequence[Table]) -> list[list[Tensor]]:
    return [
        [correlations(table, split) for split in asked.splits]
        for table, asked in zip(tables, questions, strict=True)
    ]


def _sparse(
    questions: Sequence[Questions],
    tables: Sequence[Table],
    correlated: list[list[Tensor]],
    allowed: Tensor,
) -> dict[int, Tensor]:
    """How well the best 1, 2 and 5 columns do, averaged over both halves."""
    found: dict[int, list[Tensor]] = {size: [] for size in PROBE_SIZES}
    for table, asked, of_halves in zip(tables, questions, correlated, strict=True):
        chosen = [best_columns(one.abs(), allowed, PROBE_SIZES[-1]) for one in of_halves]
        taken = [Taken.of(table, columns) for columns in chosen]
        for size in PROBE_SIZES:
            pairs = zip(taken, asked.splits, strict=True)
            found[size].append(_mean(sparse_probes(one, split, size) for one, split in pairs))
    return {size: _joined(parts) for size, parts in found.items()}


def _mean(of_halves: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(of_halves)).mean(0)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
