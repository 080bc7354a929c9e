"""Activations of known answer, and a short training on them of every architecture."""

import os
import signal
from dataclasses import dataclass

import torch

from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.grid import make_arms
from llm_wsae.training.normaliser import Normaliser
from llm_wsae.weights.choosing import choose_weights

CPU = torch.device("cpu")
ARCHITECTURES = ("topk", "batch-topk", "matryoshka", "jumprelu")
NAMES = ("uniform-k2", *(f"uniform-{a}-k2" for a in ARCHITECTURES[1:]), "uniform-relu-l0.1")
CONFIG = TrainConfig(
    expansion=4, tokens=256 * 600, batch_size=256, learning_rate=1e-2, log_every=100,
    device="cpu", dtype="float32",
)  # fmt: skip


@dataclass
class Planted:
    """An ActivationSource: sparse sums of 24 known directions in 16 dimensions, off centre."""

    num_rows: int = 30_000
    massive: bool = False
    stop_after: int | None = None

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

    def batches(self, batch_size, seed, start=0):
        number = start
        while True:
            if number == self.stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            draw = torch.Generator().manual_seed(seed * 100_003 + number)
            yield self.rows[torch.randint(self.num_rows, (batch_size,), generator=draw)]
            number += 1

    def statistics(self):
        positions = torch.arange(self.num_rows) % 32
        return Statistics(16, 32).update(self.rows, positions)

    def identity(self):
        return {"kind": "planted"}

    def normaliser(self) -> Normaliser:
        return Normaliser(self.statistics(), CPU, torch.float32)


def arms_for(source: Planted) -> list[ArmConfig]:
    weights = choose_weights(source.statistics(), ("uniform",), (1.0,))
    return make_arms(weights, (2,), (0.1,), architectures=ARCHITECTURES)
