"""How a training is distributed over processes: not at all, by rows, or by latents.

A step consists of sums over rows, over latents, or over both, and of selections of the largest
latents of a row or of a batch. An architecture's step is written once: it names what each sum goes
over, and the strategy knows which of them must cross processes.

- ``DataParallel``: every process has all latents and some rows of each batch. It divides its sums
  by the number of unmasked rows of the whole batch, so the gradients only need to be added up. Then
  all processes take the same optimiser step.
- ``LatentParallel``, for dictionaries that do not fit one device: every process holds a run of
  latents, with their optimiser state and counters, and works on all rows of each batch. Processes
  exchange their largest values and their shares of the reconstruction.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_wsae.errors import UsageError
from llm_wsae.machine.processes import Collectives, Processes, collectives
from llm_wsae.sparse import operations
from llm_wsae.sparse.codes import (
    Codes,
    PerDimension,
    PerLatent,
    RaggedCodes,
    Rows,
    Weights,
    keep_slots,
    ragged,
)
from llm_wsae.training.config import Shard

_SMALL = 1 << 16  # numbers; smaller tensors share one reduction, since each has a fixed cost
_MORE_OF_ROWS = 1.25  # rows are shuffled: every process has about its share of the largest
_MORE_OF_LATENTS = 2.0  # some processes have more of the active latents than others


class Strategy:
    """One process has all rows and all latents; ``DataParallel`` and ``LatentParallel`` differ.

    All processes must call the same methods in the same order, and get results that are equal to
    the last bit.
    """

    row_part: tuple[int, int] = (0, 1)
    """Which part of every batch's rows this process has: its number, of how many."""
    latent_parts = 1
    """How many processes share the latents."""

    def __init__(self, processes: Processes | None = None):
        self.processes = processes or Processes()

    def own_latents(self, d_sae: int) -> range:
        """The latents that this process holds."""
        return range(d_sae)

    def sum_over_rows(self, part: Tensor) -> Tensor:
        """The sum over all rows of the batch, from the sum over this process's rows."""
        return part

    def sum_over_latents(self, part: Tensor) -> Tensor:
        """The sum over all latents, from the sum over this process's latents."""
        return part

    def sum_over_all(self, part: Tensor) -> Tensor:
        """The sum over all rows and latents, from the sum over this process's."""
        return self.sum_over_latents(self.sum_over_rows(part))

    def sum_over_rows_(self, parts: Sequence[Tensor]) -> None:
        """``sum_over_rows`` of many tensors, in place."""

    def minimum(self, value: Tensor) -> Tensor:
        """The minimum over all rows and latents, from the minimum over this process's."""
        return value

    def largest_over_rows(self, values: PerLatent) -> PerLatent:
        """The largest value of every latent, from the largest in this process's rows."""
        return values

    def agree(self, want: int) -> int:
        """The largest of what all processes want."""
        return want

    def all_agree(self, yes: bool) -> bool:
        """Whether all processes say yes."""
        return not self.agree(not yes)

    def topk(self, codes: Codes, k: int) -> RaggedCodes:
        """The k largest of every row among this process's latents, given its own k largest."""
        return ragged(codes)

    def batch_topk(
        self, encode: Callable[[int], RaggedCodes], k: int, kept: Bool[Tensor, " rows"]
    ) -> RaggedCodes:
        """The largest of the whole batch, k per kept row, that are in this process's rows and
        latents; ``encode(n)`` gives its own largest, n per kept row."""
        return encode(k)

    def keep_largest(self, active: Float[Tensor, "rows own"], k: int) -> Float[Tensor, "rows own"]:
        """Of the k largest of every row, those of this process, given its own k largest; the
        others become 0."""
        return active

    def decode(self, codes: RaggedCodes, decoder: Weights, bias: PerDimension) -> Rows:
        """The reconstruction by all latents, from the codes of this process's latents."""
        return operations.decode(codes, decoder, bias)


SINGLE = Strategy()
"""The strategy of one process."""


class _SeveralProcesses(Strategy):
    """What both ways of distribution share."""

    def __init__(self, collectives: Collectives, processes: Processes | None = None):
        super().__init__(processes)
        self._collectives = collectives

    def agree(self, want: int) -> int:
        return -int(self.minimum(torch.tensor(-want)))

    def minimum(self, value: Tensor) -> Tensor:
        return self._collectives.min_(value.clone())

    def batch_topk(
        self, encode: Callable[[int], RaggedCodes], k: int, kept: Bool[Tensor, " rows"]
    ) -> RaggedCodes:
        # A process cannot know how many of its values are among the largest of all, so it tries its
        # share and some more, and twice as many as long as the smallest value of any process is
        # above the smallest of all.
        num_rows = int(kept.sum())
        wanted = k * int(self.sum_over_rows(torch.tensor(num_rows)))
        share = _MORE_OF_ROWS * k
        if self.latent_parts > 1:
            share = _MORE_OF_LATENTS * k / self.latent_parts
        per_row = math.ceil(share)
        while True:
            codes = encode(per_row)
            codes = keep_slots(codes, codes.values > 0)
            all_there = len(codes.values) < per_row * num_rows  # no more of them are positive
            values = self._gather(codes.values)
            smallest = values.new_zeros(())
            if len(values) > wanted:
                largest = values.topk(wanted, sorted=False).values
                smallest = largest.min() if wanted else values.max()
            enough = all_there or len(codes.values) == 0 or bool(codes.values.min() <= smallest)
            if self.all_agree(enough):
                return self._at_most(codes, smallest, wanted)
            per_row *= 2

    def _at_most(self, codes: RaggedCodes, smallest: Tensor, wanted: int) -> RaggedCodes:
        """The own ones of all values from ``smallest`` on; where these tie for the last place,
        the first in the order of the processes."""
        rank = self._collectives.rank
        above, level = codes.values > smallest, codes.values == smallest
        counts = torch.stack([above.sum(), level.sum()]).cpu()
        by_rank = torch.stack(self._collectives.gather(counts))
        left = wanted - int(by_rank[:, 0].sum()) - int(by_rank[:rank, 1].sum())
        return keep_slots(codes, above | (level & (level.cumsum(0) <= left)))

    def _gather(self, values: Float[Tensor, " own"]) -> Float[Tensor, " all"]:
        """The values of all processes end to end; each may have a different number."""
        gathered = self._collectives.gather(torch.tensor([len(values)]))
        lengths = [int(length) for length in gathered]
        padded = torch.nn.functional.pad(values, (0, max(lengths) - len(values)))
        parts = self._collectives.gather(padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


class DataParallel(_SeveralProcesses):
    """Each process has an equal part of the rows of a batch, up to chance."""

    def __init__(self, collectives: Collectives, processes: Processes | None = None):
        super().__init__(collectives, processes)
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

    def largest_over_rows(self, values: PerLatent) -> PerLatent:
        return -self._collectives.min_(-values)


class LatentParallel(_SeveralProcesses):
    """Each process has a run of consecutive latents, all of equal length."""

    def __init__(self, collectives: Collectives, processes: Processes | None = None):
        super().__init__(collectives, processes)
        self.latent_parts = collectives.size

    def own_latents(self, d_sae: int) -> range:
        """Raises UsageError if the latents cannot be divided evenly."""
        rank, size = self._collectives.rank, self._collectives.size
        if d_sae % size:
            raise UsageError(
                f"{d_sae} latents cannot be divided evenly among {size} processes; "
                "start a number of processes that divides them"
            )
        each = d_sae // size
        return range(rank * each, (rank + 1) * each)

    def sum_over_latents(self, part: Tensor) -> Tensor:
        return self._collectives.sum_(part.clone())

    def topk(self, codes: Codes, k: int) -> RaggedCodes:
        """Where values tie for the last place, the first in the order of the processes."""
        own, rank = codes.values.shape[1], self._collectives.rank
        everyone = torch.cat(self._collectives.gather(codes.values), dim=1)
        chosen = torch.ones_like(everyone, dtype=torch.bool)
        if everyone.shape[1] > k:
            smallest = everyone.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
            above, level = everyone > smallest, everyone == smallest
            chosen = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True)))
        chosen = chosen[:, own * rank : own * (rank + 1)] & (codes.values > 0)
        return keep_slots(ragged(codes), chosen.flatten())

    def keep_largest(self, active: Float[Tensor, "rows own"], k: int) -> Float[Tensor, "rows own"]:
        own = active.topk(min(k, active.shape[1]), dim=1, sorted=False).values
        own = torch.nn.functional.pad(own, (0, k - own.shape[1]))
        everyone = torch.cat(self._collectives.gather(own), dim=1)
        return active.mul_(active >= everyone.topk(k, dim=1).values[:, -1:])

    def decode(self, codes: RaggedCodes, decoder: Weights, bias: PerDimension) -> Rows:
        part = operations.decode(codes, decoder, torch.zeros_like(bias))
        return self._collectives.sum_(part).add_(bias)


@contextmanager
def strategy_of(processes: Processes, device: torch.device, shard: Shard) -> Iterator[Strategy]:
    """Connect the processes for a training on ``device``, until the block ends or fails."""
    if processes.size == 1:
        yield Strategy(processes)
        return
    kind = DataParallel if shard == "rows" else LatentParallel
    with collectives(processes, device) as connected:
        yield kind(connected, processes)
