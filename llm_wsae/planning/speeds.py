"""How fast the stages of a run go: measured here in a few seconds, or computed for an accelerator
that is not here from its published numbers.

The measurement runs the code of the stages itself, at the shapes that were asked for: forward
passes with the store's writer behind them, steps of the trainer, an evaluation of the dictionaries
that these steps leave. It draws nothing from torch's own generators and leaves the model as it was.
"""

import contextlib
import copy
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.packing import BEGINNING, Contexts
from llm_wsae.data.shard_writer import StoreWriter
from llm_wsae.data.shuffling import shuffled_batches
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.evaluation.activations import Context
from llm_wsae.evaluation.baselines import with_raw_dimensions
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.files import save_own_tensors
from llm_wsae.hardware import choose_device, processor_name
from llm_wsae.harvesting import kept_rows, manifest_of
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.processes import Processes
from llm_wsae.statistics.moments import SAMPLE_ROWS, Statistics
from llm_wsae.statistics.second_moment import SecondMoment
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.export import dictionary_of
from llm_wsae.training.one_site import Training
from llm_wsae.training.parallel.group import ProcessGroup
from llm_wsae.weights.choosing import choose_weights
from llm_wsae.weights.inputs import RuleInputs

SECONDS = 2.0
"""For the forward passes, and again for the steps of the training."""
_SHARE = 10  # a short run is measured on one part of so many, so that this stays worth it
_MOST_BATCHES = 8
_WARM_UP, _FEWEST_STEPS, _MOST_STEPS = 2, 3, 50
_MOST_BEFORE_DEATH = 25  # steps that are waited for the first dead latents; longer runs have fewer
_EVALUATED = 2048  # tokens of the evaluation on a CPU, where more at a time are not faster
_LARGEST_WHITENED = 1024  # dimensions; above, the time is taken to grow with their cube


@dataclass(frozen=True)
class Speeds:
    """What one unit of each stage takes, in seconds, with all arms of the training."""

    device: str
    measured: bool
    """Whether it was measured here; otherwise it follows from published numbers."""
    token: float
    """Harvest, for a token at all sites."""
    moment: float
    """Covariance, for a row."""
    weigh: float
    """Weights from it, for a site."""
    row: float
    """Training, for a row."""
    export: float
    """From trained arms to dictionaries, for a site."""
    evaluated: float
    """Evaluation, for a row at all sites."""
    byte: float
    """Writing to the disk, for a byte."""


@dataclass(frozen=True)
class Accelerator:
    """Published numbers of an accelerator."""

    name: str
    memory: int
    """Bytes."""
    flops: float
    """Operations a second of dense products in bfloat16, without structured sparsity."""
    bandwidth: float
    """Bytes a second between memory and processor."""


# NVIDIA's data sheets of each product; where they give only the number with sparsity, half of it.
# The RTX 4090: NVIDIA Ada GPU Architecture white paper, appendix A, sums in float32.
ACCELERATORS = {
    "h200": Accelerator("NVIDIA H200 SXM", 141 * 10**9, 989e12, 4.8e12),
    "h100": Accelerator("NVIDIA H100 SXM", 80 * 10**9, 989e12, 3.35e12),
    "a100": Accelerator("NVIDIA A100 SXM 80 GB", 80 * 10**9, 312e12, 2.039e12),
    "l40s": Accelerator("NVIDIA L40S", 48 * 10**9, 362e12, 864e9),
    "l4": Accelerator("NVIDIA L4", 24 * 10**9, 121e12, 300e9),
    "rtx4090": Accelerator("NVIDIA GeForce RTX 4090", 24 * 10**9, 165.2e12, 1008e9),
}
UTILISATION = 0.4
"""Share of the published operations a second that products are taken to reach."""
BANDWIDTH_REACHED = 0.6
"""Share of the published bandwidth that everything else is taken to reach."""


class _InMemory:
    """Rows that are read as those of a store are."""

    def __init__(self, rows: Tensor):
        self.num_rows, self.row_bytes, self.dtype = len(rows), rows[0].nbytes, rows.dtype
        self._rows = rows

    def read(self, start: int, out: Tensor) -> None:
        out.copy_(self._rows[start : start + len(out)])


class _Sample:
    """Some rows in memory as a trainer's source, shuffled as those of a store are."""

    def __init__(self, rows: Tensor, site: Site, statistics: Statistics, identity: dict[str, Any]):
        self.site, self.d_in = site, rows.shape[1]
        self.num_rows: int | None = len(rows)
        self._reader, self._statistics, self._identity = _InMemory(rows), statistics, identity

    def batches(
        self, batch_size: int, seed: int, start: int = 0
    ) -> Iterator[Float[Tensor, "batch d_in"]]:
        return shuffled_batches(self._reader, batch_size, seed, start)

    def statistics(self) -> Statistics:
        return self._statistics

    def identity(self) -> dict[str, Any]:
        return self._identity


def measure(
    model: LanguageModel,
    sites: Sequence[Site],
    arms: Sequence[ArmConfig],
    contexts: Sequence[Context],
    place: Path,
    harvest: HarvestConfig,
    train: TrainConfig,
    evaluate: EvaluateConfig,
) -> Speeds:
    """Measure every stage on some contexts; ``train.tokens`` is the number of rows of the training.

    What is written goes into a temporary folder in ``place``. Raises as the stages do.
    """
    with TemporaryDirectory(prefix=".plan.", dir=place) as name:
        folder = Path(name)
        # two with a row at most, say, would leave nothing to measure
        contexts = [one for one in contexts if int(one.keep.sum()) > 1] or contexts
        few = contexts[: max(2, harvest.num_contexts // _SHARE)]
        token, rows, positions = _harvest(model, sites, few, folder, harvest)
        statistics = Statistics(model.d_model, harvest.context_size).update(rows, positions)
        packing = {"packing": harvest.packing()}
        identity = {"kind": "sample", "site": str(sites[-1]), "model": model.identity(), **packing}
        sample = _Sample(rows, sites[-1], statistics, identity)
        row, export, dictionaries = _train(sample, arms, train, folder)
        dictionaries = with_raw_dimensions(dictionaries, statistics, float(arms[0].level))
        return Speeds(
            device=processor_name(model.device),
            measured=True,
            token=token,
            moment=_moment(rows),
            weigh=_weigh(model.d_model),
            row=row,
            export=export,
            evaluated=_evaluate(model, sites, dictionaries, contexts, evaluate),
            byte=_write(rows, folder),
        )


def published(
    accelerator: Accelerator,
    model: LanguageModel,
    sites: Sequence[Site],
    arms: Sequence[ArmConfig],
    place: Path,
    context_size: int,
    train: TrainConfig,
) -> Speeds:
    """The speeds of an accelerator that is not here, of plain TopK arms.

    The host's part (statistics, covariance, writing) is measured on the processor that is here.
    """
    d, d_sae, batch = model.d_model, train.expansion * model.d_model, train.batch_size
    operation = 1 / (accelerator.flops * UTILISATION)
    moved = 1 / (accelerator.bandwidth * BANDWIDTH_REACHED)
    blocks = model.hf_model.get_submodule(model.paths.blocks)
    # a product, and what causal attention adds: half of all pairs, scores and their sums
    of_block = [2 * sum(p.numel() for p in b.parameters()) + 2 * context_size * d for b in blocks]
    before = {site: sum(of_block[: _blocks_before(site)]) for site in sites}
    rest = {site: sum(of_block) - before[site] + 2 * model.W_U.numel() for site in sites}
    last = max(sites)
    # the model itself once; behind each site zeros, the mean, its dimensions and dictionaries
    evaluated = before[last] + rest[last]
    product = 2 * d * d_sae
    evaluated += sum((3 + len(arms)) * rest[site] + len(arms) * product for site in sites)
    # Adam reads and writes a weight and two moments of both matrices, and the encoder's fast copy
    adam = 2 * d * d_sae * 6 * 4 + d * d_sae * 2
    latents = batch * d_sae * 2 * 2  # written, and read to find the largest
    step = batch * product * operation + (adam + latents) * moved
    rows = torch.randn(4096, d, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    began = time.perf_counter()
    Statistics(d, context_size).update(rows, torch.arange(len(rows)) % context_size)
    host = (time.perf_counter() - began) / len(rows) * len(sites)
    with TemporaryDirectory(prefix=".plan.", dir=place) as name:
        byte = _write(rows, Path(name))
    return Speeds(
        device=accelerator.name,
        measured=False,
        token=max(max(before.values()) * operation, host),
        moment=_moment(rows),
        weigh=_weigh(d),
        row=len(arms) * step / batch,
        export=0.0,
        evaluated=operation * evaluated,
        byte=byte,
    )


def _blocks_before(site: Site) -> int:
    return site.block + (site.point != "pre")


def _harvest(
    model: LanguageModel,
    sites: Sequence[Site],
    contexts: Sequence[Context],
    folder: Path,
    config: HarvestConfig,
) -> tuple[float, Tensor, Tensor]:
    """Seconds a token; rows of the last site, and the position of each in its context."""
    size = config.contexts_per_batch
    batches = [_joined(contexts[at : at + size]) for at in range(0, len(contexts), size)]
    began = time.perf_counter()
    kept_rows(model, batches[0], sites)  # also warms up
    once = time.perf_counter() - began
    most = min(_MOST_BATCHES, config.contexts_per_shard // size)
    batches = batches[: max(1, min(most, int(SECONDS / once)))]
    count = sum(len(batch.ids) for batch in batches)
    manifest = replace(manifest_of(model, {}, sites, config), num_contexts=count)
    found = []
    with StoreWriter(folder / "store", manifest) as writer:
        began = time.perf_counter()
        for batch in batches:
            rows = kept_rows(model, batch, sites)
            writer.add(0, batch, {str(site): rows[site] for site in sites})
            found.append(rows[sites[-1]])
        writer.wait()
        seconds = time.perf_counter() - began
    positions = [torch.from_numpy(batch.keep).nonzero()[:, 1] for batch in batches]
    dtype = getattr(torch, manifest.dtype)
    tokens = count * config.context_size
    return seconds / tokens, torch.cat(found).to(dtype), torch.cat(positions)


def _joined(contexts: Sequence[Context]) -> Contexts:
    """Contexts as a packer gives them. Which documents they come from does not matter here."""
    ids = torch.stack([torch.as_tensor(context.ids) for context in contexts]).int()
    keep = torch.stack([torch.as_tensor(context.keep) for context in contexts])
    nowhere = torch.zeros_like(ids).numpy()
    return Contexts(ids.numpy(), keep.numpy(), nowhere, nowhere, BEGINNING, BEGINNING, {})


def _train(
    sample: _Sample, arms: Sequence[ArmConfig], config: TrainConfig, folder: Path
) -> tuple[float, float, dict[str, Dictionary]]:
    """Seconds a row, seconds of the export, and the dictionaries."""
    device = choose_device(config.device)
    batches = sample.batches(config.batch_size, config.shuffle_seed)
    alone = ProcessGroup(Processes())  # also where rank 0 measures and others wait for it
    training = Training(sample, arms, config, folder / "training", device, alone)
    last, warm_up = training.num_steps - 1, _WARM_UP
    before_death = training.dead_after // config.batch_size + 1
    if before_death <= _MOST_BEFORE_DEATH:  # most steps of a short run revive dead latents
        warm_up = max(warm_up, before_death)
    for number in range(warm_up):
        training.step(min(number, last), next(batches))
    training.read_numbers(1)
    most = min(_MOST_STEPS, training.num_steps // _SHARE)
    began, steps = time.perf_counter(), 0
    while steps < _FEWEST_STEPS or (steps < most and time.perf_counter() - began < SECONDS):
        training.step(min(warm_up + steps, last), next(batches))
        steps += 1
    training.read_numbers(steps)
    seconds = time.perf_counter() - began
    batches.close()  # type: ignore[attr-defined]  # ends its reading thread
    began = time.perf_counter()
    dictionaries = {
        arm.config.name: dictionary_of(
            arm, sample, training.statistics, training.normaliser, {}, {}
        )
        for arm in training.arms
    }
    return seconds / steps / config.batch_size, time.perf_counter() - began, dictionaries


def _evaluate(
    model: LanguageModel,
    sites: Sequence[Site],
    dictionaries: Mapping[str, Dictionary],
    contexts: Sequence[Context],
    config: EvaluateConfig,
) -> float:
    """Seconds a row, at all sites."""
    tokens = min(config.batch_tokens, config.tokens // _SHARE)
    if model.device.type == "cpu":
        tokens = min(_EVALUATED, config.tokens // 2)  # fewer would take longer each
    taken = contexts[: max(2, tokens // len(contexts[0].ids))]
    of_sites = {
        site: {name: _moved(dictionary, site) for name, dictionary in dictionaries.items()}
        for site in sites
    }

    def measure_on(some: Sequence[Context]) -> int:
        rows = sum(int(context.keep.sum()) for context in some)
        how = replace(config, tokens=rows, bootstraps=1)
        FidelityEvaluator(model, some, how).evaluate_sites(of_sites)
        return rows

    # its bars would be taken for the work's
    with contextlib.redirect_stderr(io.StringIO()), model.prepacked():
        measure_on(taken[:2])  # lays out the weights, once for all rows
        began = time.perf_counter()
        rows = measure_on(taken)
        return (time.perf_counter() - began) / rows


def _moved(dictionary: Dictionary, site: Site) -> Dictionary:
    """The dictionary as one of another site, with the same weights in memory."""
    other = copy.copy(dictionary)
    other.info = replace(other.info, site=str(site), massive_threshold=None)
    return other


def _moment(rows: Tensor) -> float:
    began = time.perf_counter()
    usual = rows.float()
    usual = usual[usual.norm(dim=1) <= torch.inf]  # as a pass over a store leaves out massive rows
    SecondMoment(rows.shape[1]).update(usual)
    return (time.perf_counter() - began) / len(rows)


def _weigh(d_in: int) -> float:
    import sklearn.covariance  # noqa: F401 - not to be timed: it is imported only once

    size = min(d_in, _LARGEST_WHITENED)
    rows = torch.randn(SAMPLE_ROWS, size, generator=torch.Generator().manual_seed(0))
    statistics = Statistics(size, 1).update(rows, torch.zeros(len(rows), dtype=torch.int64))
    inputs = RuleInputs(statistics, second_moment=SecondMoment(size).update(rows))
    began = time.perf_counter()
    choose_weights(inputs, ["whitening"], [0.5])
    return (time.perf_counter() - began) * (d_in / size) ** 3


def _write(rows: Tensor, folder: Path) -> float:
    began = time.perf_counter()
    save_own_tensors(folder / "rows.safetensors", {"rows": rows}, {})
    return (time.perf_counter() - began) / rows.nbytes
