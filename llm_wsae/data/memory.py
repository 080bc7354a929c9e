"""Rows in memory, for a trainer: those of a toy model, or of anything else that fits there."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.data.shuffling import shuffled_batches
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import Statistics
from llm_wsae.statistics.second_moment import SecondMoment


class MemorySource:
    """Rows in memory, as an ActivationSource. They have no context: each is a first position."""

    def __init__(self, rows: Float[Tensor, "rows d_in"], site: Site):
        """``site``: where the rows come from, or what they stand for."""
        self.site = site
        self.d_in = rows.shape[1]
        self.num_rows: int | None = len(rows)
        self._rows = rows.float().cpu().contiguous()

    def batches(
        self, batch_size: int, seed: int, start: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Float[Tensor, "rows d_in"]]:
        """Endless shuffled batches from number ``start`` on."""
        return shuffled_batches(_Reader(self._rows), batch_size, seed, start, part=part)

    def statistics(self) -> Statistics:
        """The statistics of all rows."""
        positions = torch.zeros(len(self._rows), dtype=torch.int64)
        return Statistics(self.d_in, context_size=1).update(self._rows, positions)

    def second_moment(self) -> SecondMoment:
        """The covariance sums of all rows that are not massive."""
        usual = self._rows.norm(dim=1) <= self.statistics().massive_threshold
        return SecondMoment(self.d_in).update(self._rows[usual])

    def identity(self) -> dict[str, Any]:
        """The digest of the rows."""
        return {"sha256": hashlib.sha256(self._rows.numpy().tobytes()).hexdigest()}


class _Reader:
    """The rows as ``shuffled_batches`` reads them."""

    def __init__(self, rows: Tensor):
        self._rows = rows
        self.num_rows, self.dtype = len(rows), rows.dtype
        self.row_bytes = rows.shape[1] * rows.dtype.itemsize

    def read(self, start: int, out: Tensor) -> None:
        """Fill ``out`` with rows from ``start``."""
        out.copy_(self._rows[start : start + len(out)])
