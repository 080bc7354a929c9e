"""Sums, minima, gathers and the largest values over all processes of a run, by torch.distributed.

When another process is lost, its backends wait for a long time or fail with messages of their own.
Here such a failure is replaced by the sentence that the lost process left, or one that says that it
exited without an error message.

The largest values are exact, however unevenly they are spread, and each process gets those of them
that are its own. Where values tie for the last place, the first in the order of the processes are
taken, as if all values were in one row, process after process.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed

from llm_wsae.errors import UsageError
from llm_wsae.processes import Several
from llm_wsae.sparse.codes import RaggedCodes, keep_slots

_TIMEOUT = timedelta(minutes=30)  # rank 0 may be busy writing


class Collectives:
    """Exchanges between the processes, which must all make the same calls in the same order."""

    def __init__(self, processes: Several):
        self.rank, self.size = processes.rank, processes.size
        self._processes = processes

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place; the same bits everywhere."""
        return self._reduce(tensor, distributed.ReduceOp.SUM)

    def min_(self, tensor: Tensor) -> Tensor:
        """Minimum over all processes, in place."""
        return self._reduce(tensor, distributed.ReduceOp.MIN)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, of one shape, by rank."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._explained():
            distributed.all_gather(parts, tensor.contiguous())
        return parts

    def begin_max(self, tensor: Tensor) -> distributed.Work:
        """Start a maximum in place over all processes, on the CPU; ``end`` waits for it."""
        with self._explained():
            return distributed.all_reduce(tensor, distributed.ReduceOp.MAX, async_op=True)

    def end(self, work: distributed.Work) -> None:
        """Wait for what ``begin_max`` started."""
        with self._explained():
            work.wait()

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        assert tensor.is_contiguous()
        with self._explained():
            distributed.all_reduce(tensor, operation)
        return tensor

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._processes.explain(error) from error


@contextmanager
def collectives(processes: Several, device: torch.device) -> Iterator[Collectives]:
    """Connect all processes for tensors on ``device``, until the block ends or fails.

    Raises UsageError for a device whose tensors cannot be exchanged, or a GPU without a number.
    """
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"several processes can train on cuda or cpu, not on {device.type}")
    if distributed.is_initialized():  # by the caller, who also ends it
        for kind in ("cpu", device.type):
            if f"{kind}:" not in str(distributed.get_backend_config()):
                raise UsageError(
                    f"the existing process group cannot exchange tensors on {kind}; start it with "
                    'init_process_group("cpu:gloo,cuda:nccl")'
                )
        yield Collectives(processes)
        return
    _check_numbered(device)
    processes.meet()  # the backend does not wait long for late processes
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        each_has_its_own = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= torch.cuda.device_count()
        backend = "cpu:gloo,cuda:nccl" if each_has_its_own else "gloo"
    try:
        distributed.init_process_group(
            backend,
            store=processes.new_store(),
            rank=processes.rank,
            world_size=processes.size,
            timeout=_TIMEOUT,
        )
    except RuntimeError as error:
        raise processes.explain(error) from error
    try:
        processes.meet()  # or one that fails now would leave others half connected
        yield Collectives(processes)
    finally:
        distributed.destroy_process_group()  # wakes processes that still wait for this one


def _check_numbered(device: torch.device) -> None:
    """Raises UsageError if nothing says which of the machine's GPUs is this process's own."""
    if device.type == "cuda" and device.index is None:
        raise UsageError(
            "several processes were started without LOCAL_RANK, which says which GPU each of them "
            "takes; start them with torchrun, or set LOCAL_RANK to their numbers on each machine"
        )


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
