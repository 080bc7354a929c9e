"""How well a dictionary's latents stand for concepts: sparse probing, selectivity, absorption.

Concepts of tokens and concepts of documents are tested on different units, but scored in the same
way and reported together. What does not depend on a dictionary (dense probes, the best raw
dimensions) is computed once per site.

**Removal.** The contributions of a concept's latents (activation × decoder row) are subtracted from
the activations. A monosemantic dictionary then loses that concept and no other: selectivity is the
drop in accuracy of the concept's own dense probe, minus the mean drop of all other concepts'
probes, of both kinds. The probes are those of the unchanged activations. They are linear, so they
need not be applied again: their scores fall by activation × (decoder row · probe direction).
Accuracy is the mean over both classes at the probe's own threshold; the area under the ROC curve
would hardly change where a probe is nearly perfect. The mean drop of all others is near 0, whatever
is removed, so selectivity is nearly the own drop. *Spill* looks at the other side alone: what the
five other concepts that are hit hardest lose, at the same own drop for every dictionary and
concept.

**Absorption.** A latent for "begins with s" may stay silent on *short* because a latent for *short*
contains the letter. It then looks like a latent for s and is none. Chanin et al. 2024 (arXiv
2409.14507) found this and measured it on first letters. This is our own version, on our own probes
of the words in a text; its numbers are not those of SAEBench. A letter's main latents are those
that a sparse probe of it needs (``main_latents``). On tokens of the letter that the dense probe
recognises, the letter is *missed* if no main latent is active, and *absorbed* if, in addition, one
other latent contributes to the probe's score, by activation × (decoder row · probe direction), at
least half of what separates the letter's mean score from that of all other words.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

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
from llm_wsae.statistics.measures import LETTER

HIT_HARDEST = 5
MATCHED_FALL = 0.05
"""Own drop at which spill is read off, between removals of 0, 1, 2 and 5 latents."""
GAIN = 0.02
"""More main latents are taken as long as they add this much area under the ROC curve."""
SHARE = 0.5
"""Of the distance between the mean scores, that an absorbing latent contributes at least."""
_BEST = [f"best_{size}" for size in PROBE_SIZES]
_MOST = PROBE_SIZES[-1]
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
        [_exam(one.concepts, one.splits[half], rows) for one, rows in zip(concepts, x, strict=True)]
        for half in (0, 1)
    ]
    tables = [rows.T for rows in x]
    every = torch.ones(x[0].shape[1] if x else 0, dtype=torch.bool)
    best = _sparse(halves, tables, _correlated(halves, tables), every)
    columns = {
        "dense": _over_halves([[e.split.test(e.scores) for e in exams] for exams in halves]),
        "accuracy": _over_halves([[e.accuracy() for e in exams] for exams in halves]),
    }
    return SiteProbes(halves, columns | dict(zip(_BEST, best, strict=True)))


def _exam(concepts: Concepts, split: Split, x: Tensor) -> Exam:
    return Exam(concepts.families, split, *dense_probes(x, split))


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
        removed = [best_columns(one.where(one > 0, -torch.inf), allowed, _MOST) for one in own]
        sets = torch.cat([torch.zeros(0, _MOST, dtype=torch.long), *removed])
        there = sets >= 0
        densities.append([(density[sets] * there).sum(1) / there.sum(1).clamp(min=1)])
        for size, found in drops.items():
            pairs = zip(exams, tables, strict=True)
            found.append([falls(sets[:, :size], decoder, *pair) for pair in pairs])
        parts = zip(exams, tables, own, areas, strict=True)
        absorbed.append([absorption(*part, allowed, decoder) for part in parts])
    by_size = {size: _over_halves(found, best.shape[1]) for size, found in drops.items()}
    own_fall, others_fall = selectivity(by_size[_MOST])
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
    found: list[list[Tensor]] = []
    for exams, own in zip(halves, correlated, strict=True):
        found.append([])
        for exam, table, one in zip(exams, tables, own, strict=True):
            taken = SelectedColumns.of(table, best_columns(one.abs(), allowed, _MOST))
            sizes = [sparse_probes(taken, exam.split, size) for size in PROBE_SIZES]
            found[-1].append(torch.stack(sizes))
    return _over_halves(found, len(PROBE_SIZES))


def _over_halves(found: list[list[Tensor]], rows: int | None = None) -> Tensor:
    """Numbers by half and kind, [concepts] or [rows, concepts], joined over kinds; the mean of both
    halves."""
    shape = (0,) if rows is None else (rows, 0)
    nothing = torch.zeros(shape, dtype=torch.float64)
    return torch.stack([torch.cat([nothing, *parts], -1) for parts in found]).mean(0)


def falls(
    removed: Int[Tensor, "sets count"],
    decoder: Float[Tensor, "d_sae d_in"],
    exam: Exam,
    table: Float[Tensor, "d_sae units"],
) -> Float[Tensor, "sets concepts"]:
    """Drop in accuracy of every concept's probe when one of the sets of latents is removed.

    -1 in a set stands for no latent.
    """
    taken = SelectedColumns.of(table, removed)
    # What an activation of 1 of each latent adds to each concept's score; 0 for "no latent".
    share = decoder[taken.columns].float() @ exam.directions
    share = torch.nn.functional.pad(share, (0, 0, 0, 1))
    is_removed = torch.zeros(len(removed), len(share))
    is_removed.scatter_(1, taken.place, 1.0)
    split = exam.split
    after = []
    for concept, (items, scores) in enumerate(zip(split.items, exam.scores, strict=True)):
        lost = (taken.values[items] * share[:, concept]) @ is_removed.T  # [items, sets]
        left = (scores[:, None] - lost).T
        after.append(accuracy(left, split.counts[concept], split.num_examples))
    return exam.accuracy() - torch.stack(after, 1)


def selectivity(
    falls: Float[Tensor, "concepts concepts"],
) -> tuple[Float[Tensor, " concepts"], Float[Tensor, " concepts"]]:
    """From the drop of concept j when concept i's latents are removed, [i, j]: the own drops, and
    the others' mean (NaN if there is no other concept)."""
    own = falls.diagonal()
    return own, (falls.sum(1) - own) / (falls.shape[0] - 1)


def spill(by_size: Mapping[int, Float[Tensor, "concepts concepts"]]) -> Float[Tensor, " concepts"]:
    """From the drop of concept j when concept i's best latents are removed, [i, j], by their
    number: the mean of the largest drops of others where the own drop is ``MATCHED_FALL``.

    Between two numbers of latents, both drops are taken to grow in step. NaN for a concept whose
    own drop never gets there, or that has too few others.
    """
    concepts = len(next(iter(by_size.values())))
    found = torch.full((concepts,), torch.nan, dtype=torch.float64)
    if concepts <= HIT_HARDEST:
        return found
    before = (torch.zeros_like(found), torch.zeros_like(found))
    for falls_now in by_size.values():
        own = falls_now.diagonal()
        others = falls_now.masked_fill(torch.eye(concepts, dtype=torch.bool), -torch.inf)
        hit = others.topk(HIT_HARDEST, dim=1).values.mean(1)
        there = found.isnan() & (own >= MATCHED_FALL)
        share = (MATCHED_FALL - before[0]) / (own - before[0]).clamp(min=1e-12)
        found = torch.where(there, before[1] + share * (hit - before[1]), found)
        before = (own, hit)
    return found


def main_latents(
    correlation: Float[Tensor, "concepts d_sae"],
    area: Float[Tensor, "sizes concepts"],
    allowed: Bool[Tensor, " d_sae"],
) -> Int[Tensor, "concepts most"]:
    """The 1, 2 or 5 latents that correlate most, and positively, with each concept; -1 for none.

    ``area`` is that of sparse probes of 1, 2 and 5 latents.
    """
    chosen = best_columns(correlation.where(correlation > 0, -torch.inf), allowed, _MOST)
    needed = torch.full((len(correlation),), PROBE_SIZES[0])
    for (size, less), (more, gained) in pairwise(zip(PROBE_SIZES, area, strict=True)):
        needed = needed.where((needed < size) | (gained - less < GAIN), more)
    return chosen.where(torch.arange(_MOST) < needed[:, None], -1)


def absorption(
    exam: Exam,
    table: Float[Tensor, "d_sae units"],
    correlation: Float[Tensor, "concepts d_sae"],
    area: Float[Tensor, "sizes concepts"],
    allowed: Bool[Tensor, " d_sae"],
    decoder: Float[Tensor, "d_sae d_in"],
) -> Float[Tensor, "2 concepts"]:
    """Shares of each letter's recognised examples that are missed, and that are absorbed by one
    other of the ``allowed`` latents.

    NaN for a concept that is no letter or without a recognised example, and where units are more
    than one row, so that the table is not sparse.
    """
    found = torch.full((2, len(exam.families)), torch.nan, dtype=torch.float64)
    letters = [n for n, family in enumerate(exam.families) if family == LETTER]
    if not (table.is_sparse and letters):
        return found
    main = main_latents(correlation, area, allowed)
    columns, units = table.indices()
    contributions = decoder.float() @ exam.directions[:, letters]
    n = exam.split.num_examples
    for number, concept in enumerate(letters):
        score, counts = exam.scores[concept], exam.split.counts[concept]
        examples = exam.split.items[concept, :n][(score[:n] > 0) & counts[:n]]
        apart = score[:n][counts[:n]].mean() - score[n:][counts[n:]].mean()
        is_example = _marked(examples, table.shape[1])
        of_examples = is_example[units].nonzero().squeeze(1)
        unit, column = units[of_examples], columns[of_examples]
        is_main = _marked(main[concept][main[concept] >= 0], len(decoder))[column]
        heard = torch.zeros(len(is_example)).index_add_(0, unit, is_main.float()) > 0
        speaks = table.values()[of_examples] * contributions[column, number]
        speaks = speaks.where(allowed[column] & ~is_main, -torch.inf)
        loudest = torch.zeros(len(is_example)).scatter_reduce_(0, unit, speaks, "amax")
        silent = ~heard[examples]
        taken = silent & (loudest[examples] >= SHARE * apart) & (apart > 0)
        found[0, concept], found[1, concept] = silent.double().mean(), taken.double().mean()
    return found


def _marked(numbers: Tensor, count: int) -> Bool[Tensor, " count"]:
    marks = torch.zeros(count, dtype=torch.bool)
    marks[numbers] = True
    return marks
