"""The largest values among those that several processes have, each keeping its own of them.

Exact, whoever has how many. Where values tie at the end, the first in the order of the processes
are taken, as if all were in one row after another.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_wsae.sparse.codes import RaggedCodes
from llm_wsae.training.parallel.collectives import Collectives
from llm_wsae.training.parallel.strategy import only


def largest_in_rows(
    collectives: Collectives, values: Float[Tensor, "rows own"], k: int
) -> Bool[Tensor, "rows own"]:
    """Which of one's values are among the k largest of everyone's, in every row.

    Every process must have the same number of values in a row.
    """
    own = values.shape[1]
    everyone = torch.cat(collectives.gather(values), dim=1)
    if everyone.shape[1] <= k:
        return torch.ones_like(values, dtype=torch.bool)
    smallest = everyone.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, level = everyone > smallest, everyone == smallest
    chosen = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return chosen[:, own * collectives.rank : own * (collectives.rank + 1)]


def largest_of_all(
    collectives: Collectives,
    encode: Callable[[int], RaggedCodes],
    k: int,
    kept: Bool[Tensor, " rows"],
    *,
    rows_apart: bool,
    first: float,
) -> RaggedCodes:
    """One's own of the largest positive values of the batch, k per kept row of it.

    ``encode`` gives one's own largest values, so many per kept row. One cannot know how many of
    them are among the largest of all, so ``first`` per row are tried, and more as long as
    somebody's smallest one is above the smallest of all.
    """
    num_rows = int(kept.sum())
    rows = int(collectives.sum_(torch.tensor(num_rows))) if rows_apart else num_rows
    wanted, per_row = k * rows, math.ceil(first)
    while True:
        codes = encode(per_row)
        codes = only(codes, codes.values > 0)
        all_there = len(codes.values) < per_row * num_rows  # no more of them are positive
        values = _gather(collectives, codes.values)
        smallest = values.new_zeros(())
        if len(values) > wanted:
            smallest = values.topk(wanted, sorted=False).values.min() if wanted else values.max()
        enough = all_there or len(codes.values) == 0 or bool(codes.values.min() <= smallest)
        if bool(collectives.min_(torch.tensor(int(enough)))):
            break
        per_row *= 2
    above, level = codes.values > smallest, codes.values == smallest
    counts = torch.stack([above.sum(), level.sum()]).cpu()
    by_rank = torch.stack(collectives.gather(counts))
    taken_before = int(by_rank[: collectives.rank, 1].sum())
    left = wanted - int(by_rank[:, 0].sum()) - taken_before
    return only(codes, above | (level & (level.cumsum(0) <= left)))


def _gather(collectives: Collectives, values: Float[Tensor, " own"]) -> Float[Tensor, " all"]:
    """Everyone's values end to end; they need not be equally many."""
    lengths = [int(n) for n in collectives.gather(torch.tensor([len(values)]))]
    padded = torch.nn.functional.pad(values, (0, max(lengths) - len(values)))
    parts = collectives.gather(padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
