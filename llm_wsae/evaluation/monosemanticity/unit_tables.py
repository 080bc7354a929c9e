"""Units that concepts are tested on, and tables of one number per unit and column.

A unit is one row (for concepts of tokens) or the mean of one document's rows in one context (for
concepts of documents). Columns are dimensions or latents. Probes need three operations of a table,
which a sparse one offers as well as a dense one.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.evaluation.heldout import HeldoutText


@runtime_checkable
class Table(Protocol):
    """What probes need of a table."""

    def sums(self, weights: Float[Tensor, "units w"]) -> Float[Tensor, "columns w"]:
        """Σ over units of weight · number."""
        ...

    def square_sums(self, weights: Float[Tensor, "units w"]) -> Float[Tensor, "columns w"]:
        """Σ over units of weight · number²."""
        ...

    def take(self, columns: Int[Tensor, " n"]) -> Float[Tensor, "units n"]:
        """Some columns."""
        ...


class DenseTable:
    """A table as one matrix."""

    def __init__(self, numbers: Float[Tensor, "units columns"]):
        self._numbers = numbers

    def sums(self, weights: Float[Tensor, "units w"]) -> Float[Tensor, "columns w"]:
        """See ``Table``."""
        return self._numbers.T @ weights

    def square_sums(self, weights: Float[Tensor, "units w"]) -> Float[Tensor, "columns w"]:
        """See ``Table``."""
        return self._numbers.square().T @ weights

    def take(self, columns: Int[Tensor, " n"]) -> Float[Tensor, "units n"]:
        """See ``Table``."""
        return self._numbers[:, columns]


class SparseTable:
    """A table of mostly zeros, stored as its entries (``units``, ``columns``, ``values``); no cell
    appears twice."""

    def __init__(
        self,
        unit: Int[Tensor, " entries"],
        column: Int[Tensor, " entries"],
        value: Float[Tensor, " entries"],
        shape: tuple[int, int],
    ):
        """``shape`` is (units, columns)."""
        self.units, self.columns, self.values, self._shape = unit, column, value, shape
        self._matrix = torch.sparse_coo_tensor(
            torch.stack([column, unit]), value, shape[::-1], check_invariants=False
        ).coalesce()
        self._squares = torch.sparse_coo_tensor(
            self._matrix.indices(),
            self._matrix.values().square(),
            shape[::-1],
            is_coalesced=True,
            check_invariants=False,
        )

    def sums(self, weights: Float[Tensor, "units w"]) -> Float[Tensor, "columns w"]:
        """See ``Table``."""
        return torch.sparse.mm(self._matrix, weights)

    def square_sums(self, weights: Float[Tensor, "units w"]) -> Float[Tensor, "columns w"]:
        """See ``Table``."""
        return torch.sparse.mm(self._squares, weights)

    def take(self, columns: Int[Tensor, " n"]) -> Float[Tensor, "units n"]:
        """See ``Table``."""
        units, total = self._shape
        place = torch.full((total,), -1)
        place[columns] = torch.arange(len(columns))
        at = place[self.columns]
        wanted = at >= 0
        dense = torch.zeros(units, len(columns))
        dense[self.units[wanted], at[wanted]] = self.values[wanted]
        return dense

    @property
    def num_units(self) -> int:
        """How many units it has, those without an entry included."""
        return self._shape[0]


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
