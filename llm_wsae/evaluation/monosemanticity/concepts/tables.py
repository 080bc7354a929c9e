"""Tables of one number per unit and column, where columns are dimensions or latents.

Probes need three operations of a table, which a sparse one offers as well as a dense one.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
    """A table of mostly zeros, stored as its entries; no cell appears twice."""

    def __init__(
        self,
        unit: Int[Tensor, " entries"],
        column: Int[Tensor, " entries"],
        value: Float[Tensor, " entries"],
        shape: tuple[int, int],
    ):
        """``shape`` is (units, columns)."""
        self._unit, self._column, self._value, self._shape = unit, column, value, shape
        self._matrix = self._transposed(value)
        self._squares = self._transposed(value.square())

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
        at = place[self._column]
        wanted = at >= 0
        dense = torch.zeros(units, len(columns))
        dense[self._unit[wanted], at[wanted]] = self._value[wanted]
        return dense

    def _transposed(self, value: Tensor) -> Tensor:
        indices = torch.stack([self._column, self._unit])
        return torch.sparse_coo_tensor(
            indices, value, self._shape[::-1], check_invariants=False
        ).coalesce()
