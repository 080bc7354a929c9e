"""Concepts of documents, made from the labels that their corpus gives them."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llm_wsae.errors import UsageError, nearest
from llm_wsae.evaluation.monosemanticity.concepts.concepts import Concepts, with_enough

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
    names: list[str] = []
    families: list[str] = []
    positive: list[Tensor] = []
    applies: list[Tensor] = []
    for column in dict.fromkeys(wanted) or columns:
        values = {number: own[column] for number, own in labels.items() if column in own}
        for name, having in _divided(column, values):
            names.append(name)
            families.append(column)
            positive.append(torch.isin(document, torch.tensor(sorted(having))))
            applies.append(torch.isin(document, torch.tensor(sorted(values))))
    empty = torch.zeros(len(document), 0, dtype=torch.bool)
    concepts = Concepts(
        names,
        families,
        torch.stack(positive, 1) if names else empty,
        torch.stack(applies, 1) if names else empty,
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
