"""How a training is distributed over processes: not at all, by rows, or by latents.

An architecture's step names what each sum and each selection of the largest latents goes over, and
the strategy knows which of them must cross processes. By rows, every process has all latents and
about an equal part of the rows of each batch. It divides its sums by the number of unmasked rows of
the whole batch, so the gradients only need to be added up. By latents, for dictionaries that do not
fit one device, every process holds a run of latents, all of equal length, with their optimiser
state, and works on all rows.
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
    """Which rows and latents this process has, and what it exchanges with the others.

    All processes must call the same methods in the same order, and get results that are equal to
    the last bit. Where values tie for the last place of a selection, that of the first process is
    taken.
    """

    def __init__(
        self,
        processes: Processes | None = None,
        connected: Collectives | None = None,
        shard: Shard | None = None,
    ):
        """Without ``shard`` this process has everything."""
        self.processes = processes or Processes()
        self._connected = connected
        self.shares_rows, self.shares_latents = shard == "rows", shard == "latents"

    @property
    def _all(self) -> Collectives:
        assert self._connected is not None
        return self._connected

    @property
    def row_part(self) -> tuple[int, int]:
        """Which part of every batch's rows this process has: its number, of how many."""
        return (self._all.rank, self._all.size) if self.shares_rows else (0, 1)

    @property
    def latent_parts(self) -> int:
        """How many processes share the latents."""
        return self._all.size if self.shares_latents else 1

    def own_latents(self, d_sae: int) -> range:
        """The latents that are here. Raises UsageError if they cannot be divided evenly."""
        parts = self.latent_parts
        if d_sae % parts:
            raise UsageError(
                f"{d_sae} latents cannot be divided evenly among {parts} processes; "
                "start a number of processes that divides them"
            )
        first = self._all.rank * (d_sae // parts) if self.shares_latents else 0
        return range(first, first + d_sae // parts)

    def all_latents(self, own: Tensor) -> Tensor:
        """The rows of all latents, from those of this process's latents."""
        return torch.cat(self._all.gather(own)) if self.shares_latents else own

    def sum_over_rows(self, part: Tensor) -> Tensor:
        """The sum over all rows of the batch, from the sum over this process's rows."""
        return self._all.sum_(part.clone()) if self.shares_rows else part

    def sum_over_latents(self, part: Tensor) -> Tensor:
        """The sum over all latents, from the sum over this process's latents."""
        return self._all.sum_(part.clone()) if self.shares_latents else part

    def sum_over_all(self, part: Tensor) -> Tensor:
        """The sum over all rows and latents, from the sum over this process's."""
        return self.sum_over_latents(self.sum_over_rows(part))

    def sum_over_rows_(self, parts: Sequence[Tensor]) -> None:
        """``sum_over_rows`` of many tensors, in place."""
        if not self.shares_rows:
            return
        small = [part for part in parts if part.numel() < _SMALL]
        for part in parts:
            if part.numel() >= _SMALL:
                self._all.sum_(part)
        joint = self._all.sum_(torch.cat([part.flatten().double() for part in small]))
        for part, summed in zip(small, joint.split([p.numel() for p in small]), strict=True):
            part.copy_(summed.view_as(part))

    def minimum(self, value: Tensor) -> Tensor:
        """The minimum over all rows and latents, from the minimum over this process's."""
        return self._all.min_(value.clone()) if self._connected else value

    def largest_over_rows(self, values: PerLatent) -> PerLatent:
        """The largest value of every latent, from the largest in this process's rows."""
        return -self._all.min_(-values) if self.shares_rows else values

    def agree(self, want: int) -> int:
        """The largest of what all processes want."""
        return -int(self.minimum(torch.tensor(-want))) if self._connected else want

    def all_agree(self, yes: bool) -> bool:
        """Whether all processes say yes."""
        return not self.agree(not yes)

    def topk(self, codes: Codes, k: int) -> RaggedCodes:
        """The k largest of every row among this process's latents, given its own k largest."""
        if not self.shares_latents:
            return ragged(codes)
        everyone = torch.cat(self._all.gather(codes.values), dim=1)
        order = everyone.sort(dim=1, descending=True, stable=True).indices
        chosen = torch.zeros_like(everyone, dtype=torch.bool).scatter_(1, order[:, :k], True)
        mine = chosen.split(codes.values.shape[1], dim=1)[self._all.rank] & (codes.values > 0)
        return keep_slots(ragged(codes), mine.flatten())

    def batch_topk(
        self, encode: Callable[[int], RaggedCodes], k: int, kept: Bool[Tensor, " rows"]
    ) -> RaggedCodes:
        """The largest of the whole batch, k per kept row, that are in this process's rows and
        latents; ``encode(n)`` gives its own largest, n per kept row."""
        if not self._connected:
            return encode(k)
        num_rows = int(kept.sum())
        wanted = k * int(self.sum_over_rows(torch.tensor(num_rows)))
        share = _MORE_OF_LATENTS / self.latent_parts if self.shares_latents else _MORE_OF_ROWS
        per_row = math.ceil(share * k)
        while True:
            codes = encode(per_row)
            codes = keep_slots(codes, codes.values > 0)
            parts = self._ragged_gather(codes.values)
            everyone = torch.cat(parts)
            chosen = torch.zeros_like(everyone, dtype=torch.bool)
            chosen[everyone.sort(descending=True, stable=True).indices[:wanted]] = True
            mine = chosen.split([len(part) for part in parts])[self._all.rank]
            # A process tries its share and some more. If all of these are among the largest of the
            # batch, more of its values may be.
            all_there = len(codes.values) < max(1, per_row * num_rows)
            if self.all_agree(all_there or not bool(mine.all())):
                return keep_slots(codes, mine)
            per_row *= 2

    def _ragged_gather(self, values: Float[Tensor, " own"]) -> list[Tensor]:
        """The values of all processes by rank; each may have a different number."""
        lengths = [int(one) for one in self._all.gather(torch.tensor([len(values)]))]
        padded = torch.nn.functional.pad(values, (0, max(lengths) - len(values)))
        parts = self._all.gather(padded)
        return [part[:length] for part, length in zip(parts, lengths, strict=True)]

    def keep_largest(self, active: Float[Tensor, "rows own"], k: int) -> Float[Tensor, "rows own"]:
        """Of the k largest of every row, those of this process, given its own k largest; the
        others become 0. Values that tie for the last place all stay."""
        if not self.shares_latents:
            return active
        own = active.topk(min(k, active.shape[1]), dim=1, sorted=False).values
        own = torch.nn.functional.pad(own, (0, k - own.shape[1]))
        everyone = torch.cat(self._all.gather(own), dim=1)
        return active.mul_(active >= everyone.topk(k, dim=1).values[:, -1:])

    def decode(self, codes: RaggedCodes, decoder: Weights, bias: PerDimension) -> Rows:
        """The reconstruction by all latents, from the codes of this process's latents."""
        if not self.shares_latents:
            return operations.decode(codes, decoder, bias)
        part = operations.decode(codes, decoder, torch.zeros_like(bias))
        return self._all.sum_(part).add_(bias)


SINGLE = Strategy()
"""The strategy of one process."""


@contextmanager
def strategy_of(processes: Processes, device: torch.device, shard: Shard) -> Iterator[Strategy]:
    """Connect the processes for a training on ``device``, until the block ends or fails."""
    if processes.size == 1:
        yield Strategy(processes)
        return
    with collectives(processes, device) as connected:
        yield Strategy(processes, connected, shard)
