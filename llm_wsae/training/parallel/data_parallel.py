"""Data-parallel training: every process has all latents and some rows of each batch.

The batch is what the configuration says, whatever the number of processes. The loss is a mean over
its rows that are not masked, so every process divides its sums by the number of them in the whole
batch, and gradients need only be added up. Then all take the same step.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_wsae.data.shuffling import ActivationSource, SharedSource
from llm_wsae.sparse.codes import RaggedCodes
from llm_wsae.training.parallel.collectives import Collectives
from llm_wsae.training.parallel.strategy import Split
from llm_wsae.training.parallel.topk import largest_of_all

_SMALL = 1 << 16  # numbers; smaller tensors are summed together, since each sum takes its time
_MORE = 1.25  # rows are shuffled, so that every process has about its share of the largest


class SplitRows(Split):
    """Rows are shared out: each process has about as many of a batch."""

    def __init__(self, collectives: Collectives):
        self._all = collectives
        self.row_parts = collectives.size

    def batches(
        self, source: ActivationSource, batch_size: int, seed: int, start: int
    ) -> Iterator[Float[Tensor, "rows d_in"]]:
        if isinstance(source, SharedSource):
            part = (self._all.rank, self._all.size)
            return source.own_batches(batch_size, seed=seed, start=start, part=part)
        whole = super().batches(source, batch_size, seed, start)
        return (batch.tensor_split(self._all.size)[self._all.rank] for batch in whole)

    def over_rows(self, part: Tensor) -> Tensor:
        return self._all.sum_(part.clone())

    def sum_over_rows(self, parts: Sequence[Tensor]) -> None:
        small = [part for part in parts if part.numel() < _SMALL]
        for part in parts:
            if part.numel() >= _SMALL:
                self._all.sum_(part)
        joint = self._all.sum_(torch.cat([part.flatten().double() for part in small]))
        for part, summed in zip(small, joint.split([p.numel() for p in small]), strict=True):
            part.copy_(summed.view_as(part))

    def least(self, value: Tensor) -> Tensor:
        return self._all.min_(value.clone())

    def everyone(self, yes: bool) -> bool:
        return bool(self._all.min_(torch.tensor(int(yes))))

    def batch_topk(
        self, encode: Callable[[int], RaggedCodes], k: int, kept: Bool[Tensor, " rows"]
    ) -> RaggedCodes:
        return largest_of_all(self._all, encode, k, kept, rows_apart=True, first=_MORE * k)
