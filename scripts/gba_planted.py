"""Planted data for group bias adaptation: rows whose features are known, made in memory.

Two experiments of its paper (arXiv 2506.14002). A row is the sum of some columns of a Gaussian
matrix, scaled to norm 1; a feature is recovered if a decoder row has at least a given cosine with
it. ``results_gba.py`` runs them and writes them down.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_wsae import TrainConfig, train
from llm_wsae.evaluation.baselines import raw_dimensions
from llm_wsae.files import write_json
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.architectures.gba import GBA
from llm_wsae.training.arm import ArmConfig
from llm_wsae.weights.choosing import choose_weights

ROWS = 100_000
BATCH = 256
TAUS = (0.8, 0.9)
RESONANCE_STEPS = MIXTURE_STEPS = 4000


@dataclass(frozen=True)
class Mixture:
    """An ActivationSource: rows of norm 1, each a sum of some of n Gaussian features.

    Equal parts of the rows have as many features as ``sizes`` says.
    """

    n: int
    d_in: int
    sizes: tuple[int, ...]
    seed: int

    site = Site.parse("blocks.0.hook_resid_post")
    num_rows = ROWS

    def __post_init__(self) -> None:
        # far from the seeds of initial weights, which are drawn alike and would be the features
        draw = torch.Generator().manual_seed(1_000_003 + self.seed)
        features = torch.randn(self.n, self.d_in, generator=draw)
        rows = torch.cat([self._rows(size, features, draw) for size in self.sizes])
        object.__setattr__(self, "features", _unit(features))
        object.__setattr__(self, "rows", _unit(rows))

    def _rows(self, size: int, features: Tensor, draw: torch.Generator) -> Tensor:
        chosen = torch.rand(ROWS // len(self.sizes), self.n, generator=draw).topk(size).indices
        return torch.zeros(len(chosen), self.n).scatter_(1, chosen, 1.0) @ features

    @property
    def frequency(self) -> float:
        """How often a feature is there."""
        return sum(self.sizes) / len(self.sizes) / self.n

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
        """Rows drawn with replacement."""
        number = start
        while True:
            draw = torch.Generator().manual_seed(1000 * seed + number)
            yield self.rows[torch.randint(len(self.rows), (batch_size,), generator=draw)]
            number += 1

    def statistics(self) -> Statistics:
        sample = self.rows[
            torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(0))
        ]
        return Statistics(self.d_in, 100).update(sample[:20_000], torch.arange(20_000) % 100)

    def identity(self) -> dict[str, Any]:
        return {"n": self.n, "d_in": self.d_in, "sizes": list(self.sizes), "seed": self.seed}

    def recovered(self, decoder: Tensor) -> dict[str, float]:
        """What decoder rows recover of the features."""
        return recovered(self.features, decoder)


def recovered(features: Tensor, decoder: Tensor) -> dict[str, float]:
    """τ → the share of the features with a decoder row of at least that cosine."""
    closest = (_unit(features) @ _unit(decoder).T).amax(1)
    return {str(tau): float((closest >= tau).float().mean()) for tau in TAUS}


def by_chance(d_in: int) -> dict[str, float]:
    """What as many random directions as there are latents recover in the first experiment."""
    draw = torch.Generator().manual_seed(0)
    drawn = (torch.randn(n, d_in, generator=draw) for n in (4096, RESONANCE_LATENTS))
    return recovered(*drawn)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def measure(
    source: Mixture,
    arms: Sequence[tuple[str, int]],
    latents: int,
    steps: int,
    out: Path,
    name: str,
    raw_k: int = 0,
) -> None:
    """Train architectures at their k on a mixture, and write what they recover to a JSON file; with
    ``raw_k``, what the mixture's own dimensions recover, too.

    GBA has one group: all latents have the target frequency k / latents, as in the paper's theorem.
    """
    result = out / f"{name}.json"
    if result.exists():
        return
    weights = choose_weights(source.statistics(), ("uniform",), (1.0,))[0]
    configs = [ArmConfig(weights, k=k, init_seed=source.seed, architecture=a) for a, k in arms]
    config = TrainConfig(
        lengths="unit",
        expansion=latents // source.d_in,
        tokens=steps * BATCH,
        batch_size=BATCH,
        shuffle_seed=source.seed,
        device="cpu",
        dtype="float32",
    )
    several, GBA.span = GBA.span, 1.0
    try:
        made = train(source, configs, config, out / "dictionaries" / name)
    finally:
        GBA.span = several
    found = [(arm.architecture, arm.k, made[arm.name]) for arm in configs]
    if raw_k:
        raw = raw_dimensions(found[0][2].info, source.statistics(), raw_k)
        found.append(("dimensions", raw_k, raw))
    rows = source.rows[::50]
    records = [
        {
            "architecture": architecture,
            "k": k,
            "seed": source.seed,
            "recovered": source.recovered(dictionary.W_dec),
            "l0": float((dictionary.encode(rows) > 0).sum(1).float().mean()),
            "fvu": float(
                (rows - dictionary(rows)).square().sum() / (rows - rows.mean(0)).square().sum()
            ),
        }
        for architecture, k, dictionary in found
    ]
    write_json(result, {"source": source.identity(), "latents": latents, "arms": records})


# --- A: resonance. One group, s-sparse rows, and a sweep of its target frequency.

RESONANCE_N, RESONANCE_S, RESONANCE_LATENTS = 256, 3, 768
RESONANCE_D = (12, 48)
"""Below and above √n = 16."""
RESONANCE_K = (1, 2, 4, 9, 18, 36, 72, 144)
"""Target frequency times latents; a feature's frequency is 9 / 768."""
RESONANCE_SEEDS = (0, 1)


def run_resonance(out: Path) -> None:
    """Train and measure what is missing."""
    for d_in in RESONANCE_D:
        for seed in RESONANCE_SEEDS:
            source = Mixture(RESONANCE_N, d_in, (RESONANCE_S,), seed)
            arms = [("gba", k) for k in RESONANCE_K]
            name = f"resonance-d{d_in}-s{seed}"
            measure(source, arms, RESONANCE_LATENTS, RESONANCE_STEPS, out, name)


# --- B: half of the rows have 3 features, half have 20.

MIXTURE_N, MIXTURE_D, MIXTURE_LATENTS = 128, 42, 252
IN_BAND, OUTSIDE = 5, 50
"""Target frequencies .02 and .2, beside features' .09 and the band's lower end 1/n = .008."""
MIXTURE_ARMS = (
    ("gba", IN_BAND),
    ("gba", OUTSIDE),
    ("topk", 20),
    ("topk", 30),
    ("topk", 50),
    ("batch-topk", 12),
    ("jumprelu", 12),
)
"""11.5 features are in a row on average."""
MIXTURE_BASELINES = (("frozen-decoder", 12), ("frozen-encoder", 12))
"""Of which one half stays as it was drawn."""
MIXTURE_RAW = ("dimensions", 12)
"""The mixture's own."""
MIXTURE_SEEDS = tuple(range(10))


def run_mixture(out: Path) -> None:
    """Train and measure what is missing."""
    for seed in MIXTURE_SEEDS:
        source = Mixture(MIXTURE_N, MIXTURE_D, (3, 20), seed)
        size = (MIXTURE_LATENTS, MIXTURE_STEPS, out)
        measure(source, MIXTURE_ARMS, *size, f"mixture-s{seed}")
        measure(source, MIXTURE_BASELINES, *size, f"mixture-without-s{seed}", raw_k=MIXTURE_RAW[1])
