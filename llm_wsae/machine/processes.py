"""One run in several processes, as ``torchrun`` starts them, on torch.distributed. Without a
launcher there is one process, and nothing here costs anything or needs torch.

When a process fails, its connections close, which ends the waiting of the others at once. They
raise the sentence that it left in the launcher's key-value store, or say that it left none.
"""

import atexit
import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llm_wsae.artifact import files
from llm_wsae.artifact.artifact import differences
from llm_wsae.artifact.provenance import plain
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.outside import from_environment, reason

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from tqdm import tqdm

T = TypeVar("T")

_MOST = 1 << 16  # processes of one run
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_JOIN = timedelta(minutes=10)  # for all processes to arrive
_PATIENCE = timedelta(days=7)  # with the slowest piece of work of rank 0, such as an evaluation
_TIMEOUT = timedelta(minutes=30)  # of exchanges of tensors; another may be loading or writing
_LINGER_SECONDS = 5.0  # for the sentence of a lost process to arrive


class Processes:
    """All processes of this run: one, or several that are connected by their launcher's key-value
    store."""

    def __init__(self, store: Any = None, rank: int = 0, size: int = 1):
        self.rank, self.size, self._store = rank, size, store

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which shows progress and writes files."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """A piece of work that all processes start and end together. An error in one ends it for
        all: the others raise the same sentence, with its exit code, when they next wait."""
        try:
            self.meet()
            yield
            self.meet()
        except BaseException as error:
            if self.size > 1:
                self._leave(error)
            raise

    def lead(self, work: Callable[[], T]) -> T:
        """Do the work on rank 0 only; all processes return its result."""
        result: list[Any] = [work() if self.leads else None]
        if self.size > 1:
            with self.explained() as distributed:
                distributed.broadcast_object_list(result, group=self._group)
        return result[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with self.explained() as distributed:
                distributed.all_gather_object(values, value, group=self._group)
        return values

    def meet(self) -> None:
        """Wait until all processes have called this."""
        self.gather(None)

    def check_agreed(self, mine: dict[str, Any], what: str) -> None:
        """Raise LlmWsaeError, naming each difference, unless all processes have the same values."""
        owners = ("process 0", f"process {self.rank}")
        if clauses := differences(self.lead(lambda: plain(mine)), mine, owners):
            raise LlmWsaeError(
                f"process {self.rank} has other {what} than process 0 ({clauses}); start all with "
                "the same command, on machines of one kind that share the output folder"
            )
        self.meet()  # so that none continues and leaves files behind

    @contextmanager
    def folder_lock(self, folder: Path, what: str) -> Iterator[None]:
        """Lock a folder for this run: no other may write there while one of its processes lives.
        Raises LlmWsaeError if another run has locked it."""
        # rank 0 takes the lock, then all share it
        if not self.leads:
            self.meet()
        with files.folder_lock(folder, what, shared=not self.leads) as share:
            if self.leads:
                share()
                self.meet()
            yield

    @contextmanager
    def explained(self) -> Iterator[Any]:
        """``torch.distributed`` for an exchange, whose failure becomes what another one left."""
        from torch import distributed

        try:
            yield distributed
        except RuntimeError as error:  # of torch.distributed
            try:
                self._store.wait(["error"], timedelta(seconds=_LINGER_SECONDS))
                sentence, is_usage = json.loads(self._store.get("error"))
            except RuntimeError:
                raise LlmWsaeError(
                    f"another process of this run exited without an error message "
                    f"({reason(error)}); run the same command again to resume"
                ) from error
            raise (UsageError if is_usage else LlmWsaeError)(sentence) from error

    @functools.cached_property
    def _group(self) -> Any:
        """What connects all processes, once they have all come."""
        from torch import distributed

        if not distributed.is_initialized():  # otherwise by the caller, whose own it stays
            distributed.init_process_group(
                "gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=_TIMEOUT
            )
            atexit.register(_disconnect)
        return distributed.new_group(backend="gloo", timeout=_PATIENCE)

    def _leave(self, error: BaseException) -> None:
        """Leave this error for the others, if it is the first, and wake those that wait."""
        from torch import distributed

        is_ours = isinstance(error, LlmWsaeError)
        sentence = str(error) if is_ours else f"process {self.rank} ended: {error!r}"
        with suppress(RuntimeError):  # the store has closed, and nobody could read this
            left = json.dumps([sentence, isinstance(error, UsageError)])
            self._store.compare_set("error", "", left)
        if group := self.__dict__.pop("_group", None):
            distributed.destroy_process_group(group)


def _disconnect() -> None:
    """End the threads of all groups: a process that ends beside them may be aborted."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


class Collectives:
    """Sums, minima and gathers of tensors over the processes, which must all make the same calls in
    the same order."""

    def __init__(self, processes: Processes, group: Any):
        self.rank, self.size = processes.rank, processes.size
        self._processes, self._group = processes, group

    def sum_(self, tensor: "Tensor") -> "Tensor":
        """Sum over all processes, in place; the same bits everywhere."""
        return self._reduced(tensor, "SUM")

    def min_(self, tensor: "Tensor") -> "Tensor":
        """Minimum over all processes, in place."""
        return self._reduced(tensor, "MIN")

    def _reduced(self, tensor: "Tensor", operation: str) -> "Tensor":
        assert tensor.is_contiguous()
        with self._processes.explained() as distributed:
            distributed.all_reduce(tensor, getattr(distributed.ReduceOp, operation), self._group)
        return tensor

    def gather(self, tensor: "Tensor") -> "list[Tensor]":
        """The tensors of all processes, of one shape, by rank."""
        parts = [tensor.new_empty(tensor.shape) for _ in range(self.size)]
        with self._processes.explained() as distributed:
            distributed.all_gather(parts, tensor.contiguous(), self._group)
        return parts


@contextmanager
def collectives(processes: Processes, device: "torch.device") -> Iterator[Collectives]:
    """Connect all processes for tensors on ``device``, until the block ends or fails. Raises
    UsageError if its tensors cannot be exchanged, or nothing says which GPU is this process's own.
    """
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"several processes can train on cuda or cpu, not on {device.type}")
    backend = "gloo"
    if device.type == "cuda":
        import torch

        if device.index is None:
            raise UsageError(
                "several processes were started without LOCAL_RANK, which says which GPU each of "
                "them takes; start them with torchrun, or set LOCAL_RANK to their numbers"
            )
        torch.cuda.set_device(device)
        each_has_its_own = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= torch.cuda.device_count()
        backend = "cpu:gloo,cuda:nccl" if each_has_its_own else "gloo"
    processes.meet()  # otherwise this would wait long for one that failed before
    with processes.explained() as distributed:
        connected = Collectives(processes, distributed.new_group(backend=backend, timeout=_TIMEOUT))
    processes.meet()  # otherwise one that fails now would leave others half connected
    try:
        yield connected
    finally:  # disconnect, which wakes processes that still wait for this one
        distributed.destroy_process_group(connected._group)
        del connected._group  # which a traceback would keep open


def count() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    if any(name not in os.environ for name in _ENVIRONMENT):
        return 1
    from_environment("MASTER_PORT", 0, 65535)
    return from_environment("WORLD_SIZE", 1, _MOST)


def leads() -> bool:
    """Whether this process is rank 0, without waiting for the others."""
    return count() == 1 or from_environment("RANK", 0, count() - 1) == 0


def progress(what: str, total: int, unit: str, done: int = 0) -> "tqdm":
    """A bar that the process that leads shows, for its own part of the work."""
    from tqdm import tqdm

    shape = {"unit": unit, "unit_scale": True, "dynamic_ncols": True}
    return tqdm(total=total, initial=done, desc=what, disable=not leads(), **shape)


@functools.cache
def join() -> Processes:
    """All processes of this run, as soon as each of them has called this. Raises LlmWsaeError if
    one does not, or cannot reach the others."""
    if count() == 1:
        return Processes()
    from_environment("RANK", 0, count() - 1)
    from torch import distributed

    try:
        store, rank, size = next(distributed.rendezvous("env://", timeout=_JOIN))
        return Processes(distributed.PrefixStore("llm_wsae", store), rank, size)
    except (RuntimeError, ValueError) as error:
        raise LlmWsaeError(
            f"the {count()} processes of this run did not find each other at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({reason(error)}); "
            "start them with torchrun, on another --master-port if this one is taken"
        ) from error


def may_speak() -> bool:
    """Whether this process is the one that prints an error, for all of them."""
    try:
        processes = join()
        return processes.size == 1 or processes._store.add("asked", 1) == 1
    except (LlmWsaeError, RuntimeError):
        return True  # they can no longer agree; better twice than never
