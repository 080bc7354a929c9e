"""The largest values over all processes of a run, when each has only some of the rows or latents.

They are exact, however unevenly they are spread, and each process gets those of them that are its
own. Where values tie for the last place, the first in the order of the processes are taken, as if
all values were in one row, process after process.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_wsae.machine.processes import Collectives
from llm_wsae.sparse.codes import RaggedCodes, keep_slots


def largest_in_rows(
    collectives: Collectives, values: Float[Tensor, "rows own"], k: int
) -> Bool[Tensor, "rows own"]:
    """Which of this process's values are among the k largest of all processes, in every row.

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
    rows_differ: bool,
    first: float,
) -> RaggedCodes:
    """This process's share of the largest positive values of the batch, k per kept row.

    ``encode(n)`` gives its own largest values, n per kept row; ``rows_differ`` says whether the
    processes have different rows. A process cannot know how many of its values are among the
    largest of all, so it tries ``first`` per row, and more as long as the smallest value of any
    process is above the smallest of all.
    """
    num_rows = int(kept.sum())
    rows = int(collectives.sum_(torch.tensor(num_rows))) if rows_differ else num_rows
    wanted, per_row = k * rows, math.ceil(first)
    while True:
        codes = encode(per_row)
        codes = keep_slots(codes, codes.values > 0)
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
    return keep_slots(codes, above | (level & (level.cumsum(0) <= left)))


def _gather(collectives: Collectives, values: Float[Tensor, " own"]) -> Float[Tensor, " all"]:
    """The values of all processes end to end; each may have a different number."""
    lengths = [int(n) for n in collectives.gather(torch.tensor([len(values)]))]
    padded = torch.nn.functional.pad(values, (0, max(lengths) - len(values)))
    parts = collectives.gather(padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
