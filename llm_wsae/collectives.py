"""Sums, minima and gathers of tensors over all processes of a run, by torch.distributed.

When another process is lost, its backends wait for a long time or fail with messages of their own.
Here such a failure is replaced by the sentence that the lost process left, or one that says that it
exited without an error message.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from llm_wsae.errors import UsageError
from llm_wsae.processes import Several

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

    Raises UsageError as ``check_device`` does.
    """
    check_device(device)
    processes.meet()  # the backend does not wait long for late processes
    if distributed.is_initialized():  # by the caller, who also ends it
        yield Collectives(processes)
        return
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


def check_device(device: torch.device) -> None:
    """Raises UsageError for a device whose tensors cannot be exchanged, by a process group that
    the caller has initialised if there is one, or if nothing says which of the machine's GPUs is
    this process's own."""
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"several processes can train on cuda or cpu, not on {device.type}")
    if distributed.is_initialized():
        for kind in ("cpu", device.type):
            if f"{kind}:" not in str(distributed.get_backend_config()):
                raise UsageError(
                    f"the existing process group cannot exchange tensors on {kind}; start it with "
                    'init_process_group("cpu:gloo,cuda:nccl")'
                )
    elif device.type == "cuda" and device.index is None:
        raise UsageError(
            "several processes were started without LOCAL_RANK, which says which GPU each of them "
            "takes; start them with torchrun, or set LOCAL_RANK to their numbers on each machine"
        )
