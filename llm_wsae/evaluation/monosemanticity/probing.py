"""How well a dictionary's latents stand for concepts: probing, selectivity, absorption.

Concepts of tokens and of documents are tested on different units, but scored in the same way and
reported together. A table holds a number for each column (latent or dimension) and unit: [columns,
units], sparse or dense.

**Probes** are linear, in closed form, for all concepts at once. A direction is Fisher's
discriminant: the inverse of the (slightly regularised) covariance of the training units, times the
difference of the class means. It is tested on the documents of the other half, by the area under
the ROC curve. Each half serves once for training and once for testing. Sparse probing (Gurnee et
al. 2023, arXiv 2305.01610) gives the probe only the best k columns: those with the largest
correlation with the concept.

**Removal.** The contributions of a concept's latents (activation × decoder row) are subtracted from
the activations. A monosemantic dictionary then loses that concept and no other: selectivity is the
drop in accuracy of the concept's own dense probe, minus the mean drop of all other concepts'
probes, of both kinds. Scores of the unchanged probes fall by activation × (decoder row · probe
direction). Accuracy is the mean over both classes at the probe's own threshold. *Spill* looks at
the other side alone: what the five other concepts that are hit hardest lose, at the same own drop
for every dictionary and concept.

**Absorption.** A latent for "begins with s" may stay silent on *short* because a latent for *short*
contains the letter (Chanin et al. 2024, arXiv 2409.14507). This is our own version, on our own
probes; its numbers are not those of SAEBench. On tokens of a letter that the dense probe
recognises, the letter is *missed* if none of its main latents, those that a sparse probe of it
needs, is active. It is *absorbed* if, in addition, one other latent contributes to the probe's
score at least half of what separates the letter's mean score from that of all other words.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from llm_wsae.evaluation.monosemanticity.concepts import Concepts
from llm_wsae.statistics.measures import LETTER

PROBE_SIZES = (1, 2, 5)
_MAX_ITEMS = 1000  # test units of each class; more would add little certainty
# Share of each column's variance that is added to the covariance's diagonal: it regularises dense
# probes; in sparse ones it only keeps a constant column from causing a division by zero.
RIDGE_DENSE, RIDGE_SPARSE = 1e-2, 1e-4
_TINY = 1e-12
_HIT_HARDEST = 5  # concepts, whose drop is spill
_MATCHED_FALL = 0.05  # own drop at which spill is read off
GAIN = 0.02
"""More main latents are taken as long as they add this much area under the ROC curve."""
_SHARE = 0.5  # of the distance between mean scores, that an absorbing latent contributes at least
_MOST = PROBE_SIZES[-1]
Columns = dict[str, Float[Tensor, " concepts"]]
"""Scores by name, each with a number for every concept."""


class Split(NamedTuple):
    """Concepts with one half of the documents for training and the other half for testing."""

    positive: Float[Tensor, "units concepts"]  # 1 for training examples
    negative: Float[Tensor, "units concepts"]  # 1 for training counterexamples
    items: Int[Tensor, "concepts items"]  # test units: first examples, then counterexamples
    counts: Bool[Tensor, "concepts items"]  # concepts have different numbers of test units
    num_examples: int


class Exam(NamedTuple):
    """The concepts of one kind of units, with dense probes of a site's activations that were
    trained on one half of the documents."""

    families: list[str]
    split: Split
    directions: Float[Tensor, "d_in concepts"]
    scores: Float[Tensor, "concepts items"]  # above 0 where a probe predicts an example


def auroc(scores: Float[Tensor, "concepts items"], split: Split) -> Float[Tensor, " concepts"]:
    """Probability that an example scores above a counterexample; a tie counts half. NaN where there
    is nothing to compare."""
    n = split.num_examples
    is_example, is_other = split.counts[:, :n], split.counts[:, n:]
    ordered = scores[:, n:].where(is_other, torch.inf).sort(1).values
    sought = scores[:, :n].contiguous()
    below = torch.searchsorted(ordered, sought)
    # Not above: the others come before the infinities, which no finite score reaches.
    not_above = torch.searchsorted(ordered, sought, right=True)
    wins = (below + not_above).double().where(is_example, 0.0).sum(1) / 2
    return wins / (is_example.sum(1) * is_other.sum(1))


def _accuracy(scores: Tensor, counts: Tensor, n: int) -> Tensor:
    """Mean share, of the ``n`` examples and of the counterexamples, on the right side of 0. Items
    are the last dimension."""
    sides = (scores[..., :n] > 0, counts[..., :n]), (scores[..., n:] <= 0, counts[..., n:])
    first, second = ((right & own).sum(-1).double() / own.sum(-1) for right, own in sides)
    return (first + second) / 2


def splits_of(concepts: Concepts, seed: int) -> list[Split]:
    """Both ways to train on one half of the documents and test on the other."""
    order = torch.randperm(len(concepts.half), generator=torch.Generator().manual_seed(seed))
    return [_split(concepts, train, order) for train in (concepts.half, ~concepts.half)]


def _split(concepts: Concepts, train: Tensor, order: Tensor) -> Split:
    trained = concepts.applies & train[:, None]
    tested = (concepts.applies & ~train[:, None]).T
    positive, negative = concepts.positive, concepts.positive.T
    sides = []
    for side in (tested & negative, tested & ~negative):
        # Up to _MAX_ITEMS of each class, in random order; where there are fewer, the rest is void.
        found = side[:, order].float().sort(dim=1, descending=True, stable=True)
        width = min(_MAX_ITEMS, int(side.sum(1).max())) if side.numel() else 0
        sides.append((order[found.indices[:, :width]], found.values[:, :width] > 0))
    items, counts = (torch.cat(parts, 1) for parts in zip(*sides, strict=True))
    learnt = (trained & positive).float(), (trained & ~positive).float()
    return Split(*learnt, items, counts, sides[0][0].shape[1])


def correlations(
    table: Float[Tensor, "columns units"], split: Split
) -> Float[Tensor, "concepts columns"]:
    """Correlation of each column with each concept on the training units; 0 for a constant."""
    n1, n0 = split.positive.sum(0).double(), split.negative.sum(0).double()
    mean1 = (table @ split.positive).double() / n1
    mean0 = (table @ split.negative).double() / n0
    share = n1 / (n1 + n0)
    mean = share * mean1 + (1 - share) * mean0
    square = (table.square() @ (split.positive + split.negative)).double() / (n1 + n0)
    variance = square - mean.square()
    found = (mean1 - mean0) * (share * (1 - share)).sqrt() / variance.clamp(min=_TINY).sqrt()
    return found.where(variance > 1e-6 * square, 0.0).T.float()


def best_columns(
    score: Float[Tensor, "concepts columns"], allowed: Bool[Tensor, " columns"]
) -> Int[Tensor, "concepts most"]:
    """The five allowed columns of highest score, the best first; -1 where there are fewer."""
    lack = max(0, _MOST - score.shape[1])
    best = pad(score.where(allowed, -torch.inf), (0, lack), value=-torch.inf).topk(_MOST, dim=1)
    return best.indices.where(best.values > -torch.inf, -1)


class SelectedColumns(NamedTuple):
    """Columns that any concept selected, as one dense matrix, and each concept's place in it."""

    columns: Int[Tensor, " n"]
    values: Float[Tensor, "units n_and_one"]  # the last column is 0 and stands for no column
    place: Int[Tensor, "concepts count"]


def select(
    table: Float[Tensor, "columns units"], chosen: Int[Tensor, "concepts count"]
) -> SelectedColumns:
    """Take the ``chosen`` columns of a table; -1 stands for none."""
    columns = chosen[chosen >= 0].unique()
    taken = table.index_select(0, columns)
    dense = taken.to_dense() if taken.is_sparse else taken
    place = torch.searchsorted(columns, chosen.clamp(min=0).contiguous())
    place = place.where(chosen >= 0, len(columns))
    return SelectedColumns(columns, pad(dense.T, (0, 1)).contiguous(), place)


def sparse_probes(taken: SelectedColumns, split: Split, size: int) -> Float[Tensor, " concepts"]:
    """Area under the ROC curve of probes on each concept's first ``size`` columns."""
    place = taken.place[:, :size]
    trained = ((split.positive + split.negative) > 0).any(1)
    values = taken.values[trained][:, place].double()  # [units, concepts, size]
    yes, no = split.positive[trained].double(), split.negative[trained].double()
    means = [
        torch.einsum("uck,uc->ck", values, one) / one.sum(0)[:, None] for one in (yes, no, yes + no)
    ]
    weight, centred = yes + no, (values - means[2]).permute(1, 0, 2)
    covariance = (centred * weight.T[:, :, None]).mT @ centred / weight.sum(0)[:, None, None]
    direction = _discriminant(covariance, (means[0] - means[1])[:, :, None], RIDGE_SPARSE)
    tested = taken.values[split.items[:, :, None], place[:, None, :]]
    return auroc((tested.double() * direction[:, None, :, 0]).sum(2), split)


def dense_probes(
    x: Float[Tensor, "units d_in"], split: Split
) -> tuple[Float[Tensor, "d_in concepts"], Float[Tensor, "concepts items"]]:
    """A probe on all dimensions for every concept: its direction, and x · direction − threshold of
    its test units. The threshold is midway between the means of the classes."""
    weight = split.positive + split.negative
    directions = torch.zeros(x.shape[1], weight.shape[1], dtype=torch.float64)
    thresholds = torch.zeros(weight.shape[1], dtype=torch.float64)
    # Concepts that apply to the same units share their covariance.
    masks, which = (weight > 0).unique(dim=1, return_inverse=True)
    for number, mask in enumerate(masks.T):
        mine = which == number
        rows = x[mask].double()
        covariance = torch.cov(rows.T, correction=0)
        yes, no = split.positive[mask][:, mine].double(), split.negative[mask][:, mine].double()
        mean1, mean0 = rows.T @ (yes / yes.sum(0)), rows.T @ (no / no.sum(0))
        directions[:, mine] = _discriminant(covariance, mean1 - mean0, RIDGE_DENSE)
        thresholds[mine] = ((mean1 + mean0) / 2 * directions[:, mine]).sum(0)
    found = directions.float()
    return found, (x @ found - thresholds.float()).T.gather(1, split.items)


def _discriminant(covariance: Tensor, difference: Tensor, ridge: float) -> Tensor:
    """(covariance + ridge · its diagonal)⁻¹ · difference, for one or a batch of them."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    regular = covariance + torch.diag_embed(ridge * variance + _TINY)
    return torch.linalg.solve(regular, difference)


class SiteProbes(NamedTuple):
    """Probes of a site's activations, which do not depend on a dictionary."""

    halves: list[list[Exam]]  # by half and kind of units
    columns: Columns
    """Area under the ROC curve of probes on all dimensions (``dense``) and on the best ones
    (``best_1``, ``best_2``, ``best_5``), and the ``accuracy`` of the dense probes."""


class _Case(NamedTuple):
    """An exam of a table."""

    exam: Exam
    table: Float[Tensor, "columns units"]
    correlation: Float[Tensor, "concepts columns"]

    def main(self, allowed: Tensor) -> Int[Tensor, "concepts most"]:
        """The columns that correlate most, and positively: others would strengthen a concept."""
        return best_columns(self.correlation.where(self.correlation > 0, -torch.inf), allowed)

    def areas(self, allowed: Tensor) -> Float[Tensor, "sizes concepts"]:
        """Area under the ROC curve of probes on the best 1, 2 and 5 columns."""
        taken = select(self.table, best_columns(self.correlation.abs(), allowed))
        return torch.stack([sparse_probes(taken, self.exam.split, n) for n in PROBE_SIZES])


def probe_site(
    concepts: Sequence[Concepts], x: Sequence[Float[Tensor, "_ d_in"]], seed: int
) -> SiteProbes:
    """Dense probes, and probes on the best dimensions, of each kind of units' activations ``x``."""
    x = [rows - rows.mean(0) for rows in x]  # keeps the digits of dimensions far from 0
    halves: list[list[Exam]] = [[], []]
    for one, rows in zip(concepts, x, strict=True):
        for exams, split in zip(halves, splits_of(one, seed), strict=True):
            exams.append(Exam(one.families, split, *dense_probes(rows, split)))
    areas = [_joined(auroc(exam.scores, exam.split) for exam in exams) for exams in halves]
    accuracies = [
        _joined(_accuracy(e.scores, e.split.counts, e.split.num_examples) for e in exams)
        for exams in halves
    ]
    every = torch.ones(x[0].shape[1] if x else 0, dtype=torch.bool)
    best = _best(_cases(halves, [rows.T for rows in x]), every)
    return SiteProbes(halves, {"dense": _mean(areas), "accuracy": _mean(accuracies), **best})


def probe_latents(
    site: SiteProbes,
    tables: Sequence[Tensor],
    decoder: Float[Tensor, "d_sae d_in"],
    allowed: Sequence[Bool[Tensor, " d_sae"]],
) -> list[Columns]:
    """Scores of the latents, for each choice of ``allowed`` ones: areas ``best_1``, ``best_2`` and
    ``best_5`` of sparse probes; ``own_fall`` and ``others_fall`` of the dense probes' accuracy when
    a concept's best five latents are removed, and ``selectivity``, their difference; ``spill``;
    ``missed`` and ``absorbed``, NaN unless the concept is a first letter."""
    cases = _cases(site.halves, tables)
    return [_scores(cases, decoder, one) for one in allowed]


def _scores(halves: list[list[_Case]], decoder: Tensor, allowed: Tensor) -> Columns:
    best = _best(halves, allowed)
    of_kinds = torch.stack(list(best.values())).split([len(c.exam.families) for c in halves[0]], 1)
    drops: dict[int, list[Tensor]] = {size: [] for size in PROBE_SIZES}
    absorbed = []
    for cases in halves:
        main = [case.main(allowed) for case in cases]
        sets = torch.cat([torch.zeros(0, _MOST, dtype=torch.long), *main])
        for size, found in drops.items():
            parts = (falls(sets[:, :size], decoder, case.exam, case.table) for case in cases)
            found.append(_joined(parts, len(sets)))
        needed = zip(cases, map(main_latents, main, of_kinds), strict=True)
        parts = (absorption(c.exam, c.table, own, allowed, decoder) for c, own in needed)
        absorbed.append(_joined(parts, 2))
    by_size = {size: _mean(found) for size, found in drops.items()}
    own_fall = by_size[_MOST].diagonal()
    others_fall = (by_size[_MOST].sum(1) - own_fall) / (len(own_fall) - 1)  # NaN without others
    missed, taken = _mean(absorbed)
    return best | {
        "selectivity": own_fall - others_fall,
        "own_fall": own_fall,
        "others_fall": others_fall,
        "spill": spill(by_size),
        "missed": missed,
        "absorbed": taken,
    }


def _cases(halves: list[list[Exam]], tables: Sequence[Tensor]) -> list[list[_Case]]:
    return [
        [
            _Case(exam, table, correlations(table, exam.split))
            for exam, table in zip(exams, tables, strict=True)
        ]
        for exams in halves
    ]


def _best(halves: list[list[_Case]], allowed: Tensor) -> Columns:
    areas = [_joined((case.areas(allowed) for case in cases), len(PROBE_SIZES)) for cases in halves]
    return {f"best_{n}": found for n, found in zip(PROBE_SIZES, _mean(areas), strict=True)}


def _joined(parts: Iterable[Tensor], *shape: int) -> Float[Tensor, "*shape concepts"]:
    """Numbers of the concepts of each kind of units, joined over kinds; there may be none."""
    return torch.cat([torch.zeros(*shape, 0, dtype=torch.float64), *parts], -1)


def _mean(halves: list[Tensor]) -> Tensor:
    return torch.stack(halves).mean(0)


def falls(
    removed: Int[Tensor, "sets count"],
    decoder: Float[Tensor, "d_sae d_in"],
    exam: Exam,
    table: Float[Tensor, "d_sae units"],
) -> Float[Tensor, "sets concepts"]:
    """Drop in accuracy of every concept's probe when one of the sets of latents is removed; -1 in a
    set stands for no latent."""
    taken = select(table, removed)
    # What an activation of 1 of each latent adds to each concept's score; 0 for "no latent".
    share = pad(decoder[taken.columns].float() @ exam.directions, (0, 0, 0, 1))
    is_removed = torch.zeros(len(removed), len(share))
    is_removed.scatter_(1, taken.place, 1.0)
    _, _, every, counts, n = exam.split
    after = []
    for concept, (items, scores) in enumerate(zip(every, exam.scores, strict=True)):
        lost = (taken.values[items] * share[:, concept]) @ is_removed.T  # [items, sets]
        after.append(_accuracy((scores[:, None] - lost).T, counts[concept], n))
    return _accuracy(exam.scores, counts, n) - torch.stack(after, 1)


def spill(by_size: Mapping[int, Float[Tensor, "concepts concepts"]]) -> Float[Tensor, " concepts"]:
    """From the drop of concept j when concept i's best latents are removed, [i, j], by their
    number: the mean of the largest drops of others where the own drop is ``_MATCHED_FALL``. Between
    two numbers of latents, both drops are taken to grow in step. NaN for a concept whose own drop
    never gets there, or that has too few others."""
    concepts = len(next(iter(by_size.values())))
    found = torch.full((concepts,), torch.nan, dtype=torch.float64)
    if concepts <= _HIT_HARDEST:
        return found
    before = (torch.zeros_like(found), torch.zeros_like(found))
    for falls_now in by_size.values():
        own = falls_now.diagonal()
        others = falls_now.masked_fill(torch.eye(concepts, dtype=torch.bool), -torch.inf)
        hit = others.topk(_HIT_HARDEST, dim=1).values.mean(1)
        there = found.isnan() & (own >= _MATCHED_FALL)
        share = (_MATCHED_FALL - before[0]) / (own - before[0]).clamp(min=1e-12)
        found = torch.where(there, before[1] + share * (hit - before[1]), found)
        before = (own, hit)
    return found


def main_latents(
    best: Int[Tensor, "concepts most"], area: Float[Tensor, "sizes concepts"]
) -> Int[Tensor, "concepts most"]:
    """1, 2 or 5 of the ``best`` latents of each concept, as many as a sparse probe of it needs; -1
    for none. ``area`` is by ``PROBE_SIZES``."""
    needed = torch.full((len(best),), PROBE_SIZES[0])
    for (size, less), (more, gained) in pairwise(zip(PROBE_SIZES, area, strict=True)):
        needed = needed.where((needed < size) | (gained - less < GAIN), more)
    return best.where(torch.arange(_MOST) < needed[:, None], -1)


def absorption(
    exam: Exam,
    table: Float[Tensor, "d_sae units"],
    main: Int[Tensor, "concepts most"],
    allowed: Bool[Tensor, " d_sae"],
    decoder: Float[Tensor, "d_sae d_in"],
) -> Float[Tensor, "2 concepts"]:
    """Shares of each letter's recognised examples that its ``main`` latents miss, and that one
    other of the ``allowed`` ones absorbs. NaN for a concept that is no letter or without a
    recognised example, and where units are more than one row, so that the table is not sparse."""
    found = torch.full((2, len(exam.families)), torch.nan, dtype=torch.float64)
    letters = [n for n, family in enumerate(exam.families) if family == LETTER]
    if not (table.is_sparse and letters):
        return found
    columns, units = table.indices()
    contributions = decoder.float() @ exam.directions[:, letters]
    n = exam.split.num_examples
    for number, concept in enumerate(letters):
        score, counts = exam.scores[concept], exam.split.counts[concept]
        examples = exam.split.items[concept, :n][(score[:n] > 0) & counts[:n]]
        apart = score[:n][counts[:n]].mean() - score[n:][counts[n:]].mean()
        nothing = torch.zeros(table.shape[1])
        of_examples = nothing.index_fill(0, examples, 1)[units].nonzero()[:, 0]
        unit, column = units[of_examples], columns[of_examples]
        is_main = torch.isin(column, main[concept])
        heard = nothing.index_add(0, unit, is_main.float()) > 0
        speaks = table.values()[of_examples] * contributions[column, number]
        speaks = speaks.where(allowed[column] & ~is_main, -torch.inf)
        loudest = nothing.scatter_reduce(0, unit, speaks, "amax")
        silent = ~heard[examples]
        taken = silent & (loudest[examples] >= _SHARE * apart) & (apart > 0)
        found[0, concept], found[1, concept] = silent.double().mean(), taken.double().mean()
    return found
