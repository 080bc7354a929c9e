"""What a run takes, before it starts: rows, disk, memory and time.

Sizes follow from what is asked. Times are those of the run's own first seconds, multiplied.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from llm_wsae.artifact.artifact import existing, free_space
from llm_wsae.data.harvesting import StoreWriter, finish_store, kept_rows, manifest_of
from llm_wsae.data.packing import Packer
from llm_wsae.data.rows import WINDOW_BYTES, SiteSource
from llm_wsae.data.store import ActivationStore
from llm_wsae.machine.hardware import choose_device, memory_of, peak_memory_bytes, processor_name
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site, points_of
from llm_wsae.pipeline.request import Run
from llm_wsae.statistics.moments import SAMPLE_ROWS
from llm_wsae.terminal import aligned
from llm_wsae.training.arm import PAIR_BYTES, ArmConfig
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.trainer import Training

SECONDS = 0.5  # for the forward passes, and again for the steps of the training
_SHARE = 10  # of a short run, a tenth is measured
_TOKEN = 3 * 4 + 1  # bytes: id, document, offset, and whether it gives a row
_SAMPLED = 1 / 32  # of the rows, which the statistics of a shard keep once more


@dataclass(frozen=True)
class Plan:
    """What a run takes, roughly. Sizes are in bytes, times in seconds."""

    rows: int  # at each site, at most: special tokens and padding give none
    trained_rows: int  # at each site: more than ``rows`` in several passes
    arms: int  # dictionaries at each site
    store_bytes: int
    checkpoint_bytes: int  # of all arms of a site; while it is replaced, there are two
    dictionary_bytes: int  # of all sites
    disk_bytes: int  # the most that is on the disk at a time
    disk_free: int
    memory_bytes: int  # the most in the memory of the device
    memory_there: int
    device: str
    seconds: dict[str, float] = field(default_factory=dict)  # by stage; empty if it does not fit

    def shortage(self) -> str | None:
        """A sentence that says what does not fit and what to do; None if everything fits."""
        if self.disk_bytes > self.disk_free:
            needed, there = _in_bytes(self.disk_bytes), _in_bytes(self.disk_free)
            return (
                f"the run would need {needed} of disk, but {there} are free; ask for fewer tokens "
                "or dictionaries, choose a folder on a larger disk, or keep no rows (--stream)"
            )
        if self.memory_bytes > self.memory_there:
            needed, there = _in_bytes(self.memory_bytes), _in_bytes(self.memory_there)
            return (
                f"the run would need {needed} of memory, but {self.device} has {there} in all; "
                "lower the expansion, or train fewer dictionaries at once"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {**asdict(self), "total_seconds": sum(self.seconds.values())}

    def table(self) -> str:
        """The table for people."""
        rows = [
            ["", "takes", ""],
            ["rows", f"{self.rows:,}", f"at each site; {self.trained_rows:,} to train on"],
            ["store", _in_bytes(self.store_bytes), ""],
            ["checkpoint", _in_bytes(self.checkpoint_bytes), f"of {self.arms} dictionaries"],
            ["dictionaries", _in_bytes(self.dictionary_bytes), ""],
            ["disk", _in_bytes(self.disk_bytes), f"at most, of {_in_bytes(self.disk_free)} free"],
            ["memory", _in_bytes(self.memory_bytes), f"at most, of {_in_bytes(self.memory_there)}"],
        ]
        hints = {"evaluate": "shorter with fewer --eval-tokens"}
        rows += [[stage, _in_time(s), hints.get(stage, "")] for stage, s in self.seconds.items()]
        if self.seconds:
            rows.append(["in all", _in_time(sum(self.seconds.values())), f"on {self.device}"])
        return aligned(rows, left=3)


def plan(request: Run, model: LanguageModel | None = None) -> Plan:
    """What a run takes, on the disk of its folder; no time is measured if it does not fit. What
    rules measure and the trials of an automatic α are not counted. ``model`` is one that is loaded
    already. Raises UsageError for a site that it lacks, LlmWsaeError for a text without a row."""
    model = model or request.model.load()
    request = request.of_model(model)
    arms = request.grid.likely_arms(request.weigh, model.d_model)
    size = request.train.batch_size
    rows = max(1, (request.training.tokens or request.rows) // size) * size
    found = _sizes(request, model, arms, rows)
    if found.shortage():
        return found
    with TemporaryDirectory(".partial", ".plan.", existing(request.folder)) as name:
        of_token = _first_tokens(request, model, Path(name))
        source = ActivationStore.open(name).source(min(request.sites))
        training = replace(request.training, tokens=rows)
        of_row = _first_steps(source, arms, training, Path(name) / "training")
    found = _sizes(request, model, arms, rows)  # now with the memory that a forward pass takes
    tokens = request.harvest.num_contexts * request.harvest.context_size
    if request.stream:
        tokens = tokens * rows // request.rows + request.statistics_tokens
    seconds = {
        "harvest": tokens * of_token,
        "train": len(request.sites) * rows * of_row,
        "evaluate": request.evaluate.tokens * _passes(model, request.sites, len(arms)) * of_token,
    }
    return replace(found, seconds=seconds)


def _passes(model: LanguageModel, sites: Sequence[Site], arms: int) -> float:
    """How many of the harvest's passes, which end at the last site, take as long as evaluation.
    Behind each site, blocks and head run for the model's own rows, zeros, the mean, the dimensions
    (not of an MLP) and every dictionary; a part takes as long as it has parameters."""
    ends = {one.data_ptr(): one.numel() for one in (model.W_E, model.W_U)}  # one, if they are tied
    total = sum(one.numel() for one in model.hf_model.parameters())
    head = model.W_U.numel() / ((total - sum(ends.values())) / model.num_blocks)  # in blocks
    before = {site: site.block + (site.point == "post") for site in sites}
    runs = {site: (3 if site.is_mlp else 4) + arms for site in sites}
    behind = sum(runs[site] * (model.num_blocks - before[site] + head) for site in sites)
    return behind / max(1, *before.values())


def _sizes(
    request: Run, model: LanguageModel, arms: Sequence[ArmConfig], trained_rows: int
) -> Plan:
    """The plan without its times."""
    sites, rows, train, harvest = request.sites, request.rows, request.training, request.harvest
    points = len(points_of(sites))
    d_in, device = model.d_model, choose_device(train.device)
    row = d_in * getattr(torch, manifest_of(model, {}, sites, harvest).dtype).itemsize
    weights = len(arms) * train.expansion * d_in**2  # of the encoders, or of the decoders
    store = points * (rows * row * (1 + _SAMPLED) + 8 * d_in**2)  # and the covariance
    store += harvest.num_contexts * harvest.context_size * _TOKEN
    windows = 3 * min(WINDOW_BYTES, rows * row)  # batches are cut from one, two are read ahead
    if request.stream:
        buffers = 1 if device.type == "cpu" else 3  # one is trained on, one waits, one is filled
        held = buffers * request.buffer_tokens + min(request.statistics_tokens, SAMPLE_ROWS)
        held += 2 * train.batch_size  # the rows of a batch, together and by site
        store, windows = 0, points * held * row
    checkpoint = PAIR_BYTES * weights
    dictionaries = 4 * (2 * weights + sum(arm.weights.is_matrix for arm in arms) * d_in**2)
    others = checkpoint if request.stream else dictionaries  # of a stream, all are trained at once
    disk = store + (len(sites) - 1) * others + checkpoint + max(checkpoint, dictionaries)
    together = len(sites) if request.stream else 1
    # 2 bytes more: the encoder in bfloat16
    memory = together * (PAIR_BYTES + 2) * weights + 4 * train.batch_size * train.expansion * d_in
    if device.type == "cuda":
        memory += sum(one.nbytes for one in model.hf_model.parameters())
    else:  # where the model is already, and all dictionaries stay
        memory += peak_memory_bytes() + windows + 8 * len(sites) * weights
    return Plan(
        rows=rows,
        trained_rows=trained_rows,
        arms=len(arms),
        store_bytes=int(store),
        checkpoint_bytes=checkpoint,
        dictionary_bytes=len(sites) * dictionaries,
        disk_bytes=int(disk),
        disk_free=free_space(request.folder),
        memory_bytes=memory,
        memory_there=memory_of(device),
        device=processor_name(device),
    )


def _first_tokens(request: Run, model: LanguageModel, folder: Path) -> float:
    """Harvest a few forward passes into a store; of a stream, which keeps no rows, those of one
    site. Seconds a token. The first pass is not timed, or it is the only one: if it takes so long,
    what it prepares is little beside it."""
    corpus, config = request.corpus.open("train"), request.harvest
    sites = sorted(points_of(request.sites))
    kept = sorted(points_of([min(request.sites)])) if request.stream else sites
    size = config.contexts_per_batch
    most = max(2, config.num_contexts // size // _SHARE)
    manifest = manifest_of(model, corpus.identity(), kept, config)
    manifest = replace(manifest, contexts_per_shard=size, num_contexts=0)
    blocks = Packer.for_model(model, config).blocks(corpus, size, limit=config.num_contexts)
    ends, contexts = [time.perf_counter()], [0]
    with StoreWriter(folder, manifest) as writer:
        for number, block in zip(range(most), blocks, strict=False):
            rows = kept_rows(model, block, sites)
            manifest.num_contexts += len(block.ids)  # as many as are made: the text may end before
            writer.add(number, block, {str(site): rows[site] for site in kept})
            ends.append(time.perf_counter())
            contexts.append(manifest.num_contexts)
            if ends[-1] - ends[1] > SECONDS or ends[-1] - ends[0] > 4 * SECONDS:
                break
        writer.wait()
    ends.append(time.perf_counter())
    finish_store(folder, manifest)
    warm = 1 if len(contexts) > 2 else 0  # passes that are not timed
    return (ends[-1] - ends[warm]) / (contexts[-1] - contexts[warm]) / config.context_size


def _first_steps(
    source: SiteSource, arms: Sequence[ArmConfig], config: TrainConfig, folder: Path
) -> float:
    """Seconds a row of a few steps of the training; the first is not timed."""
    batches = source.batches(config.batch_size, config.shuffle_seed)
    # alone, also where rank 0 measures and others wait for it
    training = Training(source, arms, config, folder, choose_device(config.device))

    def step(batch: Tensor | tuple[Tensor, ...]) -> None:
        training.step(batch if isinstance(batch, tuple) else (batch,))

    step(next(batches))
    training.read_numbers()
    began, steps, most = time.perf_counter(), 0, (training.num_steps - 1) // _SHARE
    while not steps or (time.perf_counter() - began < SECONDS and steps < most):
        steps += 1
        step(next(batches))
    training.read_numbers()
    seconds = time.perf_counter() - began
    batches.close()  # type: ignore[attr-defined]  # ends its reading thread
    return seconds / steps / config.batch_size


def _in_bytes(count: int) -> str:
    sizes = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
    unit = next((unit for unit, size in sizes.items() if count >= size), "KiB")
    return f"{count / sizes[unit]:,.1f} {unit}"


def _in_time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
