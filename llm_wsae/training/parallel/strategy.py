"""How a training is distributed over processes: not at all, by rows, or by latents.

A step consists of sums over rows, over latents, or over both, and of selections of the largest
latents of a row or of a batch. An architecture's step is written once: it names what each sum goes
over, and the strategy knows which of them must cross processes.

- ``Strategy``: the ordinary case of one process, in which none must and all of this costs nothing.
- ``DataParallel``: every process has all latents and some rows of each batch. The batch is as
  configured, whatever the number of processes. The loss is a mean over its unmasked rows, so every
  process divides its sums by their number in the whole batch, and the gradients only need to be
  added up. Then all processes take the same optimiser step.
- ``LatentParallel``, for dictionaries that do not fit one device: every process holds a run of
  latents, with their optimiser state and counters, and works on all rows of each batch. What
  crosses processes is about as wide as the rows are: the largest values of each process, so that
  the largest of all are known, and its share of the reconstruction. Everything else about a latent
  happens where it is held.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_wsae.errors import UsageError
from llm_wsae.machine.processes import Collectives
from llm_wsae.sparse import operations
from llm_wsae.sparse.codes import Codes, RaggedCodes, keep_slots, ragged
from llm_wsae.training.parallel.largest import largest_in_rows, largest_of_all

_SMALL = 1 << 16  # numbers; smaller tensors share one reduction, since each has a fixed cost
_MORE_OF_ROWS = 1.25  # rows are shuffled: every process has about its share of the largest
_MORE_OF_LATENTS = 2.0  # some processes have more of the active latents than others


class Strategy:
    """One process has all rows and all latents; ``DataParallel`` and ``LatentParallel`` differ.

    All processes must call the same methods in the same order. They get results that are equal to
    the last bit, so that what each of them computes from these stays equal too.
    """

    row_part: tuple[int, int] = (0, 1)
    """Which part of every batch's rows this process has: its number, and how many parts there
    are."""
    latent_parts = 1
    """How many processes share the latents."""

    def own_latents(self, d_sae: int) -> range:
        """The latents that this process holds."""
        return range(d_sae)

    def own_groups(self, groups: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """This process's part of groups of latents (first, end), counted from its first latent."""
        return groups

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

    def largest_over_rows(self, values: Float[Tensor, " latents"]) -> Float[Tensor, " latents"]:
        """The largest value of every latent, from the largest in this process's rows."""
        return values

    def all_agree(self, yes: bool) -> bool:
        """Whether all processes say yes."""
        return yes

    def count_latents(self, number: int) -> int:
        """``sum_over_latents`` of a plain number."""
        return number

    def topk(self, codes: Codes, k: int) -> RaggedCodes:
        """The k largest of every row among this process's latents, given its own k largest."""
        return ragged(codes)

    def batch_topk(
        self, encode: Callable[[int], RaggedCodes], k: int, kept: Bool[Tensor, " rows"]
    ) -> RaggedCodes:
        """The largest of the whole batch, k per kept row, that are in this process's rows and
        latents.

        ``encode(n)`` gives this process's own largest, n per kept row.
        """
        return encode(k)

    def encode_dead(
        self,
        x: Float[Tensor, "rows d_in"],
        encoder: Float[Tensor, "some d_in"],
        bias: Float[Tensor, " some"],
        dead: Bool[Tensor, " some"] | None,
        k: int,
    ) -> Float[Tensor, "rows some"]:
        """Of the k largest dead latents in every row, those of this process."""
        return operations.encode_dead(x, encoder, bias, dead, k)

    def decode(
        self,
        codes: RaggedCodes,
        decoder: Float[Tensor, "latents d_in"],
        bias: Float[Tensor, " d_in"],
    ) -> Float[Tensor, "batch d_in"]:
        """The reconstruction by all latents, from the codes of this process's latents."""
        return operations.decode(codes, decoder, bias)


SINGLE = Strategy()
"""The strategy of one process."""


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

    def largest_over_rows(self, values: Float[Tensor, " latents"]) -> Float[Tensor, " latents"]:
        return -self._collectives.min_(-values)

    def all_agree(self, yes: bool) -> bool:
        return bool(self._collectives.min_(torch.tensor(int(yes))))

    def batch_topk(
        self, encode: Callable[[int], RaggedCodes], k: int, kept: Bool[Tensor, " rows"]
    ) -> RaggedCodes:
        given = (self._collectives, encode, k, kept)
        return largest_of_all(*given, rows_differ=True, first=_MORE_OF_ROWS * k)


class LatentParallel(Strategy):
    """Each process has a run of consecutive latents, all of equal length."""

    def __init__(self, collectives: Collectives):
        self._collectives = collectives
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

    def own_groups(self, groups: list[tuple[int, int]]) -> list[tuple[int, int]]:
        own = self.own_latents(groups[-1][1])
        inside = [[min(max(bound, own.start), own.stop) for bound in group] for group in groups]
        return [(first - own.start, stop - own.start) for first, stop in inside]

    def sum_over_latents(self, part: Tensor) -> Tensor:
        return self._collectives.sum_(part.clone())

    def minimum(self, value: Tensor) -> Tensor:
        return self._collectives.min_(value.clone())

    def all_agree(self, yes: bool) -> bool:
        return bool(self._collectives.min_(torch.tensor(int(yes))))

    def count_latents(self, number: int) -> int:
        return int(self._collectives.sum_(torch.tensor(number)))

    def topk(self, codes: Codes, k: int) -> RaggedCodes:
        chosen = largest_in_rows(self._collectives, codes.values, k) & (codes.values > 0)
        return keep_slots(ragged(codes), chosen.flatten())

    def batch_topk(
        self, encode: Callable[[int], RaggedCodes], k: int, kept: Bool[Tensor, " rows"]
    ) -> RaggedCodes:
        given = (self._collectives, encode, k, kept)
        return largest_of_all(
            *given, rows_differ=False, first=_MORE_OF_LATENTS * k / self.latent_parts
        )

    def encode_dead(
        self,
        x: Float[Tensor, "rows d_in"],
        encoder: Float[Tensor, "some d_in"],
        bias: Float[Tensor, " some"],
        dead: Bool[Tensor, " some"] | None,
        k: int,
    ) -> Float[Tensor, "rows some"]:
        active = operations.encode_dead(x, encoder, bias, dead, k)
        own = active.topk(min(k, len(encoder)), dim=1, sorted=False).values
        own = torch.nn.functional.pad(own, (0, k - own.shape[1]))
        everyone = torch.cat(self._collectives.gather(own), dim=1)
        return active.mul_(active >= everyone.topk(k, dim=1).values[:, -1:])

    def decode(
        self,
        codes: RaggedCodes,
        decoder: Float[Tensor, "latents d_in"],
        bias: Float[Tensor, " d_in"],
    ) -> Float[Tensor, "batch d_in"]:
        part = operations.decode(codes, decoder, torch.zeros_like(bias))
        return self._collectives.sum_(part).add_(bias)
