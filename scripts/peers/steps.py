"""The training steps that bench_train.py compares: ours, the peers', and the floor's two parts.

This process is its worker: it holds one trainer and takes timed steps when it is asked to.

Runs in a peer's own environment, so it needs numpy and torch only, and each step imports its tool
itself. The benchmark writes a number of steps to its standard input and reads lines of JSON from
the pipe whose number it got: first the versions, once the trainer stands and took its first steps,
then after every turn the seconds of each step and the memory.

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
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_PROCESS = Path("/proc/self")
DEAD_AFTER = 10_000_000  # rows, as in the peers: within a benchmark nobody's latents die
LONG = 1_000_000  # steps of a training that this is the beginning of
LEARNING_RATE = 3e-4
AUXK_ALPHA = 1 / 32  # of Gao et al. 2024; sparsify's default is 0
TILES = (512, 1024, None)  # rows; None: all at once


@dataclass(frozen=True)
class Job:
    """What to train."""

    rows: str
    """A .npy file of float32 rows [batches × batch, d_in]; of a transcoder, what it reads and what
    it should write side by side, [batches × batch, 2·d_in]."""
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
    dtype: str = "auto"
    """Number format of our products and of the floor's: auto is ours, and the faster one there."""


@dataclass(frozen=True)
class Trainer:
    """A trainer ready for its first step."""

    step: Callable[..., object]
    """One whole training step on a batch of rows [batch, d_in], and a transcoder's targets."""
    state: Callable[[], Iterable[Tensor]]
    """The parameters and the optimiser's state."""
    about: str = ""
    """What the reader should know about this trainer."""


def state_of(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters and the state of a torch optimiser."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    states = [v for state in optimiser.state.values() for v in state.values()]
    return parameters + [tensor for tensor in states if torch.is_tensor(tensor)]


def serve(make: Callable[..., Trainer], package: str | None = None) -> None:
    """Run this process as a worker. ``make`` builds the trainer from the job and all rows, and a
    transcoder's targets.

    ``package`` is the distribution whose version the benchmark shows.
    """
    answers = os.fdopen(int(sys.argv[2]), "w")
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    rows = [part.contiguous() for part in torch.from_numpy(np.load(job.rows)).split(job.d_in, 1)]
    batches = list(zip(*(part.to(job.device).split(job.batch) for part in rows), strict=True))
    memory = _OnGpu() if job.device == "cuda" else _Resident()

    few = replace(job, d_sae=min(job.d_sae, 32 * job.k))
    rehearsal = make(few, *rows)
    for _ in range(2):
        rehearsal.step(*(part[: min(job.batch, 256)] for part in batches[0]))
    del rehearsal
    gc.collect()
    before = memory.now()

    trainer = make(job, *rows)
    trainer.step(*batches[0])  # the first one makes the optimiser's state
    memory.reset_peak()
    trainer.step(*batches[1 % len(batches)])
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
            seconds.append(seconds_of(trainer.step, *batch))
        peak = memory.peak()
        extra = None if peak is None or before is None else max(0, peak - before - state_bytes)
        answer(seconds=seconds, extra_bytes=extra)


def seconds_of(step: Callable[..., object], x: Tensor, *target: Tensor) -> float:
    """How long a step takes, up to the end of what it asked of the device."""
    _finish(x)
    begin = time.perf_counter()
    step(x, *target)
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


def ours(job: Job, rows: Tensor, targets: Tensor | None = None) -> Trainer:
    """From raw rows on: normalise the batch, then one step of every arm.

    The variant is the number of arms, which differ in seed and share the batch, as in a training;
    or ``unit``, one whose decoder rows have length 1.
    """
    from llm_wsae.machine.hardware import fast_dtype
    from llm_wsae.statistics.moments import Statistics
    from llm_wsae.training.arm import Arm, ArmConfig
    from llm_wsae.training.config import TrainConfig, default_learning_rate
    from llm_wsae.training.normaliser import Normaliser
    from llm_wsae.weights.loss_weights import weights_from_rule

    device = torch.device(job.device)
    fast = fast_dtype(device, "encoder") if job.dtype == "auto" else getattr(torch, job.dtype)
    start = torch.zeros(len(rows), dtype=torch.int64)
    read = written = Statistics(job.d_in, 1).update(rows, start)
    how = {"lengths": "unit" if job.variant == "unit" else "auto"}
    if targets is not None:
        written = Statistics(job.d_in, 1).update(targets, start)
        how["is_transcoder"] = True
    normaliser = Normaliser(read, device, fast, target=None if targets is None else written)
    weights = weights_from_rule("variance", 0.5, written)
    arms = [
        Arm(ArmConfig(weights, job.k, init_seed=seed), job.d_in, job.d_sae, device, **how)
        for seed in range(1 if job.variant == "unit" else int(job.variant))
    ]
    learning_rate, rows_seen = default_learning_rate(job.d_sae), 0

    def step(x: Tensor, target: Tensor | None = None) -> None:
        nonlocal rows_seen
        rows_seen += len(x)
        batch = normaliser.batch(x, target)
        for arm in arms:
            arm.last_fired[: job.dead] = rows_seen - 2 * DEAD_AFTER
            arm.step(batch, rows_seen, learning_rate, TrainConfig.aux_coefficient, DEAD_AFTER)

    def state() -> list[Tensor]:
        return [tensor for arm in arms for tensor in arm.state().values()]

    return Trainer(step, state, str(fast).removeprefix("torch."))


def sparsify(job: Job, rows: Tensor, targets: Tensor | None = None) -> Trainer:
    """eai-sparsify: the operations of its Trainer's loop around one SparseCoder, with Adam. A
    transcoder's decoder rows keep any length, as there."""
    if job.device == "cpu":  # where Triton is installed, it would use it without a GPU too
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    is_transcoder = targets is not None
    config = SparseCoderConfig(num_latents=job.d_sae, k=job.k, transcode=is_transcoder)
    coder = SparseCoder(job.d_in, config, device=job.device)
    optimiser = torch.optim.Adam(coder.parameters(), lr=2e-4 / (job.d_sae / 2**14) ** 0.5)
    dead = torch.arange(job.d_sae, device=job.device) < job.dead if job.dead else None

    def step(x: Tensor, target: Tensor | None = None) -> None:
        if not is_transcoder:
            coder.set_decoder_norm_to_unit_norm()
        out = coder(x, target, dead_mask=dead)
        (out.fvu + AUXK_ALPHA * out.auxk_loss).backward()
        if not is_transcoder:
            coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()

    about = "bfloat16, Triton" if job.device == "cuda" else "float32"
    return Trainer(step, lambda: state_of(optimiser), about)


def saelens(job: Job, rows: Tensor) -> Trainer:
    """SAELens' SAETrainer with a TopKTrainingSAE. Variants: autocast (bfloat16), float32."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=job.d_in, d_sae=job.d_sae, k=job.k, device=job.device)
    )
    config = SAETrainerConfig(
        total_training_samples=LONG * job.batch,
        train_batch_size_samples=job.batch,
        lr=LEARNING_RATE,
        lr_end=LEARNING_RATE,
        device=job.device,
        autocast=job.variant == "autocast",
    )
    trainer = SAETrainer(config, sae, iter(()))

    def step(x: Tensor) -> None:
        trainer.n_forward_passes_since_fired[: job.dead] = config.dead_feature_window + 1
        trainer.step(x)
        trainer.n_training_steps += 1

    about = "bfloat16" if job.variant == "autocast" else "float32"
    return Trainer(step, lambda: state_of(trainer.optimizer), about)


def dictionary_learning(job: Job, rows: Tensor) -> Trainer:
    """dictionary_learning's TopKTrainer.update."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=LONG,
        activation_dim=job.d_in,
        dict_size=job.d_sae,
        k=job.k,
        layer=0,
        lm_name="benchmark",
        device=job.device,
    )
    numbers = count(1)  # step 0 would also look for the geometric median of the rows

    def step(x: Tensor) -> None:
        trainer.num_tokens_since_fired[: job.dead] = trainer.dead_feature_threshold
        trainer.update(next(numbers), x)

    return Trainer(step, lambda: state_of(trainer.optimizer), "float32")


def matmul(job: Job, rows: Tensor, targets: Tensor | None = None) -> Trainer:
    """The encoder's product, in whichever number format and tiling is the fastest here."""
    ways = {}
    for dtype in ("float32", "bfloat16") if job.dtype == "auto" else (job.dtype,):
        for tile in TILES:
            name = f"{dtype}, {tile or 'all'} rows at a time"
            ways[name] = _product(job, getattr(torch, dtype), tile or job.batch)
        if dtype == "float32" and job.device == "cpu":  # torch leaves this to MKL
            ways["float32 by oneDNN"] = _onednn_product(job)
    x = rows[: job.batch].to(job.device)
    fastest = min(ways, key=lambda name: min(seconds_of(ways[name], x) for _ in range(3)))
    return Trainer(lambda x, target=None: ways[fastest](x), lambda: [], fastest)


def _product(job: Job, dtype: torch.dtype, tile: int) -> Callable[[Tensor], None]:
    encoder = torch.randn(job.d_sae, job.d_in).to(job.device, dtype)
    out = torch.empty(tile, job.d_sae, dtype=dtype, device=job.device)

    def step(x: Tensor) -> None:
        for part in x.to(dtype).split(tile):
            torch.mm(part, encoder.T, out=out[: len(part)])

    return step


def _onednn_product(job: Job) -> Callable[[Tensor], None]:
    encoder = torch.randn(job.d_sae, job.d_in)

    def step(x: Tensor) -> None:
        for part in x.split(TILES[0]):
            torch.ops.mkldnn._linear_pointwise(part, encoder, None, "none", [], "")

    return step


def adam(job: Job, rows: Tensor, targets: Tensor | None = None) -> Trainer:
    """Fused Adam over the parameters."""
    shapes = (job.d_sae, job.d_in), (job.d_sae, job.d_in), (job.d_sae,), (job.d_in,)
    parameters = [torch.nn.Parameter(torch.randn(shape, device=job.device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimiser = torch.optim.Adam(parameters, fused=True)
    return Trainer(
        lambda x, target=None: optimiser.step(), lambda: state_of(optimiser), "float32, fused"
    )


STEPS = {  # how to make a trainer, and the distribution whose version the benchmark shows
    "ours": (ours, None),
    "sparsify": (sparsify, "eai-sparsify"),
    "saelens": (saelens, "sae-lens"),
    "dictionary_learning": (dictionary_learning, "dictionary-learning"),
    "matmul": (matmul, None),
    "adam": (adam, None),
}

if __name__ == "__main__":
    serve(*STEPS[sys.argv[3]])
