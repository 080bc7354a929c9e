"""How a training is distributed over processes: not at all, by rows, or by latents.

A step consists of sums over rows, over latents, or over both, and of selections of the largest
latents of a row or of a batch. An architecture's step is written once: it names what each sum goes
over, and the strategy knows which of them must cross processes. This file holds the ordinary case
of one process, in which none must and all of this costs nothing.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_wsae.sparse import operations
from llm_wsae.sparse.codes import Codes, RaggedCodes, ragged


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


def keep_slots(codes: RaggedCodes, keep: Bool[Tensor, " active"]) -> RaggedCodes:
    """The codes with only the slots for which ``keep`` is true."""
    before = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    return RaggedCodes(codes.indices[keep], codes.values[keep], before[codes.offsets])
