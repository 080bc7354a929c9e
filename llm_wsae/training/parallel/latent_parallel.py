"""Latent-parallel training, for dictionaries that do not fit one device.

Every process holds a run of latents, with their optimiser state and counters, and works on all rows
of each batch. What crosses processes is about as wide as the rows are: the largest values of each
process, so that the largest of all are known, and its share of the reconstruction. Everything else
about a latent happens where it is held.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_wsae.errors import UsageError
from llm_wsae.sparse import operations
from llm_wsae.sparse.codes import Codes, RaggedCodes, ragged
from llm_wsae.training.parallel.collectives import Collectives
from llm_wsae.training.parallel.strategy import Strategy, keep_slots
from llm_wsae.training.parallel.topk import largest_in_rows, largest_of_all

_MORE = 2.0  # some processes have more of the active latents than others


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
        return largest_of_all(*given, rows_differ=False, first=_MORE * k / self.latent_parts)

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
