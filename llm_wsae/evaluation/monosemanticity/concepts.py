"""Concepts whose truth is known: labels that latents can be tested against.

A concept says yes or no about every unit it applies to. A unit is one row (for concepts of tokens)
or the mean of one document's rows in one context (for concepts of documents). Concepts of tokens
are computed from the text (``token_concepts.py``), concepts of documents come from the labels that
their corpus gives them (``document_concepts`` below). A concept is kept when both halves of the
documents hold enough examples and counterexamples: a probe that was trained on one half is tested
on the other, so no document is on both sides.
"""

from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llm_wsae.errors import UsageError, nearest
from llm_wsae.evaluation.heldout import HeldoutText

MIN_UNITS = 20  # examples, and counterexamples, of a concept in each half
NO_UNIT = -1
MAX_CONTEXTS = 1000  # units of documents


class Units(NamedTuple):
    """Which rows make up which unit."""

    of_row: Int[Tensor, " rows"]
    """The unit of each row of the text, -1 if it has none."""
    size: Int[Tensor, " units"]
    """Rows in each unit."""
    document: Int[Tensor, " units"]
    """The document of each unit."""

    @property
    def single(self) -> bool:
        """Whether every unit is one row: few latents are then active in a unit."""
        return bool((self.size == 1).all())


class Concepts(NamedTuple):
    """Concepts of units (rows, or parts of documents)."""

    names: list[str]
    families: list[str]
    """The group of each concept, e.g. ``letter``; each label of documents is a family."""
    positive: Bool[Tensor, "units concepts"]
    """Whether the unit is an example of the concept."""
    applies: Bool[Tensor, "units concepts"]
    """Whether the concept says anything about the unit."""
    half: Bool[Tensor, " units"]
    """Which half of the documents the unit belongs to."""

    def keep(self, chosen: Bool[Tensor, " concepts"]) -> "Concepts":
        """Only the chosen concepts."""
        numbers = chosen.nonzero()[:, 0].tolist()
        return Concepts(
            [self.names[i] for i in numbers],
            [self.families[i] for i in numbers],
            self.positive[:, chosen],
            self.applies[:, chosen],
            self.half,
        )


def with_enough(concepts: Concepts, groups: Int[Tensor, " units"], min_groups: int) -> Concepts:
    """The concepts with enough examples and counterexamples in each half, from at least
    ``min_groups`` groups."""
    kept = torch.ones(len(concepts.names), dtype=torch.bool)
    numbers, group = groups.unique(return_inverse=True)
    for half in (concepts.half, ~concepts.half):
        for side in (concepts.positive, ~concepts.positive):
            found = side & concepts.applies & half[:, None]
            kept &= found.sum(0) >= MIN_UNITS
            if min_groups > 1:
                seen = torch.zeros(len(numbers), found.shape[1])
                seen.index_add_(0, group, found.float())
                kept &= (seen > 0).sum(0) >= min_groups
    return concepts.keep(kept)


def halves_of_documents(text: HeldoutText, seed: int) -> dict[int, bool]:
    """For each document, whether it is in the first half.

    Documents with similar labels, or of similar length where they have none, are paired, and chance
    sends one of each pair to either half, so that the halves are alike even for few documents.
    """
    numbers, rows = text.document_of.unique(return_counts=True)
    sizes = dict(zip(numbers.tolist(), rows.tolist(), strict=True))

    labels = {n: text.headers[n]["labels"] if n in text.headers else {} for n in sizes}
    values: dict[str, set[str]] = defaultdict(set)
    for own in labels.values():
        for key, value in own.items():
            values[key].add(str(value))
    columns = sorted(values, key=lambda key: (len(values[key]), key))  # the coarsest label first

    def order(number: int) -> tuple[bool, list[str], int, int]:
        own = labels[number]
        return not own, [str(own.get(key)) for key in columns], sizes[number], number

    ordered = sorted(sizes, key=order)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(2, ((len(ordered) + 1) // 2,), generator=generator).tolist()
    return {number: (i + first[i // 2]) % 2 == 0 for i, number in enumerate(ordered)}


_MIN_DOCUMENTS = 2  # with examples, and with counterexamples, in each half
_MAX_VALUES = 6  # numbers with more values are cut into thirds


def document_concepts(
    headers: Mapping[int, dict[str, Any]],
    document: Int[Tensor, " units"],
    half: Bool[Tensor, " units"],
    wanted: tuple[str, ...] = (),
) -> Concepts:
    """One concept for each value of each label, of units that belong to documents.

    A label with two values is one concept; numbers with more than six values are cut into thirds of
    the documents. Raises UsageError for a wanted label that no document has.
    """
    present = document.unique().tolist()
    labels = {n: headers[n]["labels"] for n in present if n in headers}
    columns = sorted({key for own in labels.values() for key in own})
    for name in wanted:
        if name not in columns:
            raise UsageError(f"no document has a label {name!r}; {nearest(name, columns)}")
    found: list[tuple[str, str, set[int], set[int]]] = []
    for column in dict.fromkeys(wanted) or columns:
        values = {number: own[column] for number, own in labels.items() if column in own}
        found += [(name, column, own, set(values)) for name, own in _divided(column, values)]

    def belongs(documents: list[set[int]]) -> Bool[Tensor, "units concepts"]:
        some = [torch.isin(document, torch.tensor(sorted(own))) for own in documents]
        return torch.stack(some, 1) if some else torch.zeros(len(document), 0, dtype=torch.bool)

    concepts = Concepts(
        [name for name, *_ in found],
        [family for _, family, *_ in found],
        belongs([having for *_, having, _ in found]),
        belongs([labelled for *_, labelled in found]),
        half,
    )
    return with_enough(concepts, document, _MIN_DOCUMENTS)


def _divided(column: str, values: dict[int, Any]) -> list[tuple[str, set[int]]]:
    """The concepts of one label, each with its documents."""
    distinct = sorted(set(values.values()), key=lambda value: (str(type(value)), value))
    numeric = all(type(value) in (int, float) for value in distinct)
    if numeric and len(distinct) > _MAX_VALUES:
        ordered = sorted(values.values())
        # Above the smallest value, or nothing would lie below the cut.
        above = next(value for value in ordered if value > ordered[0])
        cuts = sorted({float(max(ordered[i * len(ordered) // 3], above)) for i in (1, 2)})
        edges = [float("-inf"), *cuts, float("inf")]
        if len(cuts) == 1:  # two parts make one concept
            edges = edges[:2]
        return [
            (_third(column, low, high), {n for n, v in values.items() if low <= v < high})
            for low, high in pairwise(edges)
        ]
    if len(distinct) == 2:
        distinct = distinct[:1]
    return [
        (f"{column}={value}", {number for number, own in values.items() if own == value})
        for value in distinct
    ]


def _third(column: str, low: float, high: float) -> str:
    if low == float("-inf"):
        return f"{column}<{high:g}"
    return f"{column}>={low:g}" if high == float("inf") else f"{low:g}<={column}<{high:g}"


def units_of_tokens(text: HeldoutText, count: int, seed: int) -> Units:
    """``count`` rows of documents, drawn at random (all, if there are fewer), each a unit."""
    rows = (text.document_of >= 0).nonzero()[:, 0]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    chosen = rows[order[:count]].sort().values
    of_row = torch.full((text.num_rows,), NO_UNIT)
    of_row[chosen] = torch.arange(len(chosen))
    return Units(of_row, torch.ones_like(chosen), text.document_of[chosen])


def units_of_documents(text: HeldoutText, seed: int) -> Units:
    """Up to 1000 contexts, drawn at random; a unit is the rows of the document that most of its
    context belongs to. Only documents with labels count."""
    owner = text.owner
    labelled = [number for number, header in text.headers.items() if header["labels"]]
    mine = text.document_of == owner[text.context]
    rows = torch.bincount(text.context[mine], minlength=text.num_contexts)
    usable = (torch.isin(owner, torch.tensor(labelled)) & (rows > 0)).nonzero()[:, 0]
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed))
    chosen = usable[order[:MAX_CONTEXTS]].sort().values
    unit = torch.full((text.num_contexts,), NO_UNIT)
    unit[chosen] = torch.arange(len(chosen))
    return Units(unit[text.context].where(mine, NO_UNIT), rows[chosen], owner[chosen])
