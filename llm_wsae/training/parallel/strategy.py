"""How a training is shared out among processes: not at all, by rows, or by latents.

A step consists of sums over rows, over latents, or over both, and of selections of the largest
latents of a row or of a batch. A step says of each of them what it goes over, and is written once;
what is shared out decides which of them must go over the processes too. Here is the ordinary case,
in which none must: all of this then costs nothing.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_wsae.data.shuffling import ActivationSource
from llm_wsae.sparse import operations
from llm_wsae.sparse.codes import Codes, RaggedCodes, ragged


class Split:
    """One process has all rows and all latents; see ``data_parallel`` and ``sharded`` for others.

    All processes must ask for the same things in the same order. What they get is equal to the last
    bit, so that what each of them computes from it stays equal too.
    """

    row_parts = 1
    """How many processes share the rows."""
    latent_parts = 1
    """How many processes share the latents."""

    def batches(
        self, source: ActivationSource, batch_size: int, seed: int, start: int
    ) -> Iterator[Float[Tensor, "rows d_in"]]:
        """Of every batch of the source, the rows that this process works on."""
        return source.batches(batch_size, seed=seed, start=start)

    def own_latents(self, d_sae: int) -> range:
        """The latents that this process holds."""
        return range(d_sae)

    def own_groups(self, groups: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """One's own part of groups of latents (first, end), counted from one's own first."""
        return groups

    def over_rows(self, part: Tensor) -> Tensor:
        """The sum over all rows of the batch, from the sum over one's own."""
        return part

    def over_latents(self, part: Tensor) -> Tensor:
        """The sum over all latents, from the sum over one's own."""
        return part

    def over_all(self, part: Tensor) -> Tensor:
        """The sum over all rows and latents, from the sum over one's own."""
        return self.over_latents(self.over_rows(part))

    def sum_over_rows(self, parts: Sequence[Tensor]) -> None:
        """``over_rows`` of many tensors, in place."""

    def least(self, value: Tensor) -> Tensor:
        """The smallest over all rows and latents, from the smallest over one's own."""
        return value

    def everyone(self, yes: bool) -> bool:
        """Whether all processes say yes."""
        return yes

    def count_latents(self, number: int) -> int:
        """``over_latents`` of a plain number."""
        return number

    def topk(self, codes: Codes, k: int) -> RaggedCodes:
        """The k largest in every row, own latents only, from the k largest of one's own."""
        return ragged(codes)

    def batch_topk(
        self, encode: Callable[[int], RaggedCodes], k: int, kept: Bool[Tensor, " rows"]
    ) -> RaggedCodes:
        """Of the largest of the whole batch, k per kept row, those in one's own rows and latents.

        ``encode`` gives the largest of one's own, so many per kept row.
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
        """Of the k largest of all dead latents in every row, those of one's own."""
        return operations.encode_dead(x, encoder, bias, dead, k)

    def decode(
        self,
        codes: RaggedCodes,
        decoder: Float[Tensor, "latents d_in"],
        bias: Float[Tensor, " d_in"],
    ) -> Float[Tensor, "batch d_in"]:
        """The reconstruction by all latents, from the codes of one's own."""
        return operations.decode(codes, decoder, bias)


ALONE = Split()


def only(codes: RaggedCodes, keep: Tensor) -> RaggedCodes:
    """The codes without the slots that ``keep [active]`` says no of."""
    before = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    return RaggedCodes(codes.indices[keep], codes.values[keep], before[codes.offsets])
