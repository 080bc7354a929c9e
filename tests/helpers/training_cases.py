"""What trainings are tested on: a problem for the step of each architecture, with those steps; and
activations of known answer, with a short training on them."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import SecondMoment, Statistics
from llm_wsae.training.architecture import Architecture, Batch, Parameters, Step, squared
from llm_wsae.training.architectures import find_architecture
from llm_wsae.training.arm import ArmConfig, initial_parameters, make_arms
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.normaliser import Normaliser
from llm_wsae.training.strategy import SINGLE, Strategy
from llm_wsae.weights.loss_weights import choose_weights

CPU = torch.device("cpu")
D_IN, D_SAE, BATCH, K, L1 = 32, 256, 1300, 8, 0.02
STEPS = (
    *("topk", "batch-topk", "matryoshka", "jumprelu"),
    *(f"{name}, {way}" for name in ("relu", "gba") for way in ("dense", "sparse")),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}
"""Of gradients beside those of autograd in float64."""


def problem(dtype: torch.dtype, matrix: bool = False) -> tuple[Parameters, Batch, Tensor]:
    """Parameters in general position, with biases large enough for masked rows, which are 0, to
    have latents above 0; a batch with such rows; and γ with zeros in it, or any matrix."""
    # of bfloat16 some draws have ties in a batch's largest, which processes break differently
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    start = initial_parameters(D_IN, D_SAE, 0, CPU)
    parameters = Parameters(*(part.double() + 0.05 * draw(*part.shape) for part in start))
    parameters.encoder_bias[::7] += 1.5
    x = draw(BATCH, D_IN)
    mask = (torch.rand(BATCH, generator=generator) > 0.1).double()
    gamma = 2 * torch.rand(D_IN, generator=generator, dtype=torch.float64)
    gamma[:3] = 0
    if matrix:
        gamma = draw(D_IN, D_IN)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    x = (x * mask[:, None]).to(exact)
    parameters = Parameters(*(p.to(exact) for p in parameters))
    return parameters, Batch(x, x.to(dtype), mask.to(exact)), gamma.to(exact)


def gradients_of(step: Step) -> Parameters:
    """By all parameters."""
    return Parameters(*step.summed(), step.by_decoder_bias)


def error(found: Tensor, expected: Tensor) -> float:
    """The relative difference."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def largest_error(found: Any, expected: Any) -> float:
    """The largest relative difference of several tensors."""
    return max(error(one, other) for one, other in zip(found, expected, strict=True))


def architecture(name: str, like: Tensor, k: int = K, strategy: Strategy = SINGLE) -> Architecture:
    """The architecture of a step, with a memory in the dtype of ``like``: JumpReLU's thresholds
    from below the bandwidth to above most pre-activations, BatchTopK's running threshold, and GBA's
    thresholds and amplitudes."""
    kind = find_architecture(name.split(",")[0])
    found = kind(L1 if kind.setting == "l1" else k, D_SAE, strategy=strategy)
    own = strategy.own_latents(D_SAE)
    draws = torch.rand(2, D_SAE, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    draws = draws[:, own.start : own.stop].to(like.dtype)
    if name == "jumprelu":
        found.log_threshold = (2.5 * draws[0] + 0.01).log()
    if name.startswith("gba"):
        found.threshold, found.amplitude = 2 * draws + 0.01
    if name in ("batch-topk", "matryoshka"):
        found.running_threshold.fill_(1.0)
    return found


def step_of(
    name: str,
    parameters: Parameters,
    batch: Batch,
    gamma: Tensor,
    k: int = K,
    strategy: Strategy = SINGLE,
    made: Architecture | None = None,
) -> Step:
    """The named step on a problem or, by the strategy, on a part of it; the name says which of the
    two of an architecture that begins dense."""
    way = name.partition(", ")[2]
    made = made or architecture(name, batch.x, k, strategy)
    return getattr(made, f"{way}_step" if way else "step")(parameters, batch, squared(gamma))


ARCHITECTURES = ("topk", "batch-topk", "matryoshka", "jumprelu", "gba")
NAMES = ("uniform-k2", *(f"uniform-{a}-k2" for a in ARCHITECTURES[1:]), "uniform-relu-l0.1")
CONFIG = TrainConfig(
    expansion=4, tokens=256 * 400, batch_size=256, learning_rate=1e-2, log_every=100,
    device="cpu", dtype="float32",
)  # fmt: skip


@dataclass
class Planted:
    """An ActivationSource: sparse sums of 24 known directions in 16 dimensions, off centre."""

    num_rows: int = 30_000
    massive: bool = False
    stop_after: int | None = None
    """The batch before which ``what`` happens: SIGTERM, if nothing else is given."""
    what: Callable[[], object] = lambda: os.kill(os.getpid(), signal.SIGTERM)

    d_in = 16
    site = Site.parse("blocks.3.hook_resid_post")

    def __post_init__(self):
        draw = torch.Generator().manual_seed(7)
        self.directions = torch.randn(24, 16, generator=draw)
        self.directions /= self.directions.norm(dim=1, keepdim=True)
        codes = 0.5 + torch.rand(self.num_rows, 24, generator=draw)
        codes *= torch.rand(self.num_rows, 24, generator=draw) < 0.08
        self.rows = 3 * codes @ self.directions + torch.linspace(-2, 2, 16)
        if self.massive:
            self.rows[::500] *= 1000

    def batches(self, batch_size, seed, start=0, part=(0, 1)):
        number, (own, parts) = start, part
        while True:
            if number == self.stop_after:
                self.what()
            draw = torch.Generator().manual_seed(seed * 100_003 + number)
            chosen = torch.randint(self.num_rows, (batch_size,), generator=draw)
            yield self.rows[chosen].tensor_split(parts)[own]
            number += 1

    def statistics(self):
        positions = torch.arange(self.num_rows) % 32
        return Statistics(16, 32).update(self.rows, positions)

    def second_moment(self):
        return SecondMoment(16).update(self.rows)

    def identity(self):
        return {"kind": "planted", "num_rows": self.num_rows}

    def normaliser(self, fast: torch.dtype = torch.float32) -> Normaliser:
        return Normaliser(self.statistics(), CPU, fast)


def arms_for(
    source: Planted,
    rules: tuple[str, ...] = ("uniform",),
    ks: tuple[int, ...] = (2,),
    l1s: tuple[float, ...] = (0.1,),
    architectures: tuple[str, ...] = ARCHITECTURES,
) -> list[ArmConfig]:
    weights = choose_weights(source.statistics(), rules, (0.5,))
    return make_arms(weights, ks, l1s, architectures=architectures)


def fvu(dictionary: Dictionary, rows: Tensor) -> float:
    return float((rows - dictionary(rows)).square().sum() / (rows - rows.mean(0)).square().sum())


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def check_same(out: Path, expected: Path, names: Any) -> None:
    """The weights of these dictionaries are the same bytes, and what was logged the same."""
    for name in names:
        file = f"{name}/sae_weights.safetensors"
        assert (out / file).read_bytes() == (expected / file).read_bytes(), name
    for one, other in zip(log_of(out), log_of(expected), strict=True):
        assert one["arms"] == {name: other["arms"][name] for name in names}
