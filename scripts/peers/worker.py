"""A worker process of bench_train.py: holds one trainer and takes timed steps when it is asked to.

Runs in a peer's own environment, so it needs numpy and torch only. The benchmark writes a number
of steps to its standard input and reads lines of JSON from the pipe whose number it got: first the
versions, once the trainer stands and took its first steps, then after every turn the seconds of
each step and the memory.

Memory is the highest resident size during the turns, less the resident size before the trainer was
built, less its parameters and optimiser state, which every trainer has. A rehearsal with few
latents comes before, so that the code pages a step touches are not counted as its memory. The
system's counter of the highest size can be reset on Linux only; elsewhere memory is not reported.
On a GPU it is what torch allocated there, and a step ends when the device has done it.
"""

import ctypes
import gc
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Job:
    """What to train."""

    rows: str
    """A .npy file of float32 rows [batches × batch, d_in]."""
    d_in: int
    d_sae: int
    k: int
    batch: int
    """Rows per step."""
    variant: str
    """Which of a peer's ways to train; what it means is the peer's affair."""
    threads: int
    device: str = "cpu"
    """Or ``cuda``. Batches are there before a step begins."""
    dead: int = 0
    """So many latents count as dead in every step, whether they fire or not."""


@dataclass(frozen=True)
class Trainer:
    """A trainer ready for its first step."""

    step: Callable[[Tensor], object]
    """One whole training step on a batch of rows [batch, d_in]."""
    state: Callable[[], Iterable[Tensor]]
    """The parameters and the optimiser's state."""
    about: str = ""
    """What the reader should know about this trainer."""


def state_of(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters and the state of a torch optimiser."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    states = [v for state in optimiser.state.values() for v in state.values()]
    return parameters + [tensor for tensor in states if torch.is_tensor(tensor)]


def serve(make: Callable[[Job, Tensor], Trainer], package: str | None = None) -> None:
    """Run this process as a worker. ``make`` builds the trainer from the job and all rows.

    ``package`` is the distribution whose version the benchmark shows.
    """
    answers = os.fdopen(int(sys.argv[2]), "w")
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    rows = torch.from_numpy(np.load(job.rows))
    batches = list(rows.to(job.device).split(job.batch))
    memory = _OnGpu() if job.device == "cuda" else _Resident()

    few = replace(job, d_sae=min(job.d_sae, 32 * job.k))
    rehearsal = make(few, rows)
    for _ in range(2):
        rehearsal.step(batches[0][: min(job.batch, 256)])
    del rehearsal
    gc.collect()
    before = memory.now()

    trainer = make(job, rows)
    trainer.step(batches[0])  # the first one makes the optimiser's state
    memory.reset_peak()
    trainer.step(batches[1 % len(batches)])
    state_bytes = sum(tensor.nbytes for tensor in trainer.state())
    version = importlib.metadata.version(package) if package else ""

    def answer(**facts: object) -> None:
        answers.write(json.dumps(facts) + "\n")
        answers.flush()

    answer(version=version, torch=torch.__version__, about=trainer.about)
    number = 2
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            batch = batches[number % len(batches)]
            number += 1
            seconds.append(seconds_of(trainer.step, batch))
        peak = memory.peak()
        extra = None if peak is None or before is None else max(0, peak - before - state_bytes)
        answer(seconds=seconds, extra_bytes=extra)


def seconds_of(step: Callable[[Tensor], object], x: Tensor) -> float:
    """How long a step takes, up to the end of what it asked of the device."""
    _finish(x)
    begin = time.perf_counter()
    step(x)
    _finish(x)
    return time.perf_counter() - begin


def _finish(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


class _Resident:
    """Resident memory of this process in bytes; None where the system does not tell."""

    def now(self) -> int | None:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # or what was freed but not given back would count as there already
            trim(0)
        return self._of("VmRSS")

    def peak(self) -> int | None:
        return self._of("VmHWM")

    def reset_peak(self) -> None:
        counter = _PROCESS / "clear_refs"
        if counter.exists():
            counter.write_text("5")

    def _of(self, counter: str) -> int | None:
        status = _PROCESS / "status"
        if not status.exists():
            return None
        line = next(line for line in status.read_text().splitlines() if line.startswith(counter))
        return int(line.split()[1]) * 1024


class _OnGpu:
    """What torch has allocated on the GPU, in bytes."""

    def now(self) -> int:
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()
