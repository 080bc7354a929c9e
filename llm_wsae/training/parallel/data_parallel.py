"""Data-parallel training: every process has all latents and some rows of each batch.

The batch is as configured, whatever the number of processes. The loss is a mean over its unmasked
rows, so every process divides its sums by their number in the whole batch, and the gradients only
need to be added up. Then all processes take the same optimiser step.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from llm_wsae.sparse.codes import RaggedCodes
from llm_wsae.training.parallel.collectives import Collectives
from llm_wsae.training.parallel.strategy import Strategy
from llm_wsae.training.parallel.topk import largest_of_all

_SMALL = 1 << 16  # numbers; smaller tensors share one reduction, since each has a fixed cost
_MORE = 1.25  # rows are shuffled, so every process has about its share of the largest values


class DataParallel(Strategy):
    """Each process has an equal part of the rows of a batch, up to chance."""

    def __init__(self, collectives: Collectives):
        self._collectives = collectives
        self.row_part = (collectives.rank, collectives.size)

    def sum_over_rows(self, part: Tensor) -> Tensor:
        return self._collectives.sum_(part.clone())

    def sum_over_rows_(self, parts: Sequence[Tensor]) -> None:
        small = [part for part in parts if part.numel() < _SMALL]
        for part in parts:
            if part.numel() >= _SMALL:
                self._collectives.sum_(part)
        joint = self._collectives.sum_(torch.cat([part.flatten().double() for part in small]))
        for part, summed in zip(small, joint.split([p.numel() for p in small]), strict=True):
            part.copy_(summed.view_as(part))

    def minimum(self, value: Tensor) -> Tensor:
        return self._collectives.min_(value.clone())

    def all_agree(self, yes: bool) -> bool:
        return bool(self._collectives.min_(torch.tensor(int(yes))))

    def batch_topk(
        self, encode: Callable[[int], RaggedCodes], k: int, kept: Bool[Tensor, " rows"]
    ) -> RaggedCodes:
        given = (self._collectives, encode, k, kept)
        return largest_of_all(*given, rows_differ=True, first=_MORE * k)
