"""The toy experiment of Cui et al. 2026, with the trainer of this package.

A toy model of superposition puts 200 sparse features into 20 dimensions, and dictionaries of 200
latents are trained on what it makes of them: plain ones and weighted ones, on the same rows. The
features are known, so each dictionary can be compared with the truth. Beside them stand the closed
form W_pᵀ of theorem 1, which knows the truth, and random directions, which are untrained.

A dictionary is TopK with half as many latents on a row as there are features on average. With a
ReLU alone, 200 latents reconstruct 20 dimensions from other directions than the true ones, at any
sparsity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.artifact.files import write_json
from llm_wsae.artifact.outputs import check_file, check_folder, is_record_of
from llm_wsae.artifact.provenance import plain, versions
from llm_wsae.data.shuffling import MemorySource
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import UsageError
from llm_wsae.evaluation.baselines import frozen_random
from llm_wsae.lab.theory.closed_form import recovered
from llm_wsae.lab.theory.config import TheoryConfig
from llm_wsae.lab.theory.recovery import Recovery, measure
from llm_wsae.lab.theory.superposition import Superposition, toy_model
from llm_wsae.model.site import Site
from llm_wsae.terminal import aligned
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.trainer import train
from llm_wsae.weights.loss_weights import choose_weights
from llm_wsae.weights.rules import Rule, RuleInputs

COMMAND, REPORT = "theory", "theory.json"
FEATURES, DIMENSIONS, LATENTS = 200, 20, 200
"""n, n_p and n_m of the paper."""
CLOSED_FORM, RANDOM = "closed form", "random directions"
_SITE = Site.parse("blocks.0.hook_resid_post")  # a name that dictionaries must have
_MODEL_STEPS = 1500
_TRAIN_ROWS, _TEST_ROWS, _BATCH = 50_000, 10_000, 256
_LEARNING_RATE = 0.01  # at Adam's usual 0.001 plain dictionaries are not finished
_FAR = 1_000_003  # from the seeds of initial weights, which would begin as the features do
_MOST_ACTIVE = DIMENSIONS // 2  # more latents reconstruct a row whatever their directions


@dataclass(frozen=True)
class ToyReport:
    """What every dictionary finds, at every sparsity."""

    config: TheoryConfig
    found: dict[float, dict[str, list[Recovery]]]
    """By sparsity and name of the dictionary: one for every seed."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = {f"{sparsity:g}": by_name for sparsity, by_name in self.found.items()}
        return {"config": plain(self.config), "found": plain(found)}

    def table(self) -> str:
        """Means over seeds, with the least and the most, and the meaning of each column."""
        rows = [["S", "dictionary", *_COLUMNS]]
        for sparsity, by_name in self.found.items():
            for name, of_seeds in by_name.items():
                cells = [_over_seeds([getattr(one, key) for one in of_seeds]) for key in _KEYS]
                rows.append([f"{sparsity:g}", name, *cells])
        width = max(map(len, _COLUMNS))
        meanings = [f"{name.ljust(width)}  {meaning}" for name, meaning in _COLUMNS.items()]
        return "\n".join([aligned(rows, left=2), "", *meanings])


_KEYS = ("recovered", "mmcs", "l_gt", "features_per_latent")
_COLUMNS = {
    "recovered": "share of the true features with a decoder row at a cosine above 0.9",
    "MMCS": "mean over features of the largest cosine with a decoder row",
    "L_GT": "share of the features' energy that is missing when each is read from its own latent",
    "features/latent": "true features that a latent answers to (1: monosemantic)",
}


def run_toy(config: TheoryConfig, out: Path) -> ToyReport:
    """Run or finish the toy experiment; ``out`` receives a training for every sparsity and seed,
    and ``theory.json``.

    Raises UsageError for an unknown rule, or one that needs a first dictionary or a language model,
    and as ``train`` does.
    """
    for name in config.rule:
        if Rule.parse(name).need not in (None, "second_moment"):
            raise UsageError(
                f"the toy experiment cannot measure what the rule {name} reads; take a rule that "
                "reads the rows alone, like variance or whitening"
            )
    check_folder(out)
    check_file(out / REPORT, is_record_of(COMMAND))
    found: dict[float, dict[str, list[Recovery]]] = {}
    for sparsity in dict.fromkeys(config.sparsity):
        by_name = found.setdefault(sparsity, {})
        for seed in dict.fromkeys(config.seeds):
            for name, one in _compared(config, sparsity, seed, out).items():
                by_name.setdefault(name, []).append(one)
    report = ToyReport(config, found)
    write_json(out / REPORT, {"command": COMMAND, "versions": versions(), **report.to_dict()})
    return report


def _compared(config: TheoryConfig, sparsity: float, seed: int, out: Path) -> dict[str, Recovery]:
    """What every dictionary of one toy model finds."""
    draw = torch.Generator().manual_seed(_FAR + seed)
    data = Superposition(toy_model(FEATURES, DIMENSIONS, sparsity, draw, _MODEL_STEPS), sparsity)
    source = MemorySource(data.observe(_features(data, _TRAIN_ROWS, draw)), _SITE)
    x = _features(data, _TEST_ROWS, draw)
    dictionaries = _trained(config, source, _active(data), seed, out / f"S{sparsity:g}-seed{seed}")
    like = next(iter(dictionaries.values()))
    mean = source.statistics().mean.float()
    dictionaries[RANDOM] = frozen_random(like, mean, float(_active(data)), seed)
    found = {name: _measured(one, data, x) for name, one in dictionaries.items()}
    found[CLOSED_FORM] = measure(data.mixing.T, recovered(data.mixing, x), data.mixing, x)
    return found


def _trained(
    config: TheoryConfig, source: MemorySource, k: int, seed: int, out: Path
) -> dict[str, Dictionary]:
    inputs = RuleInputs(source.statistics(), second_moment=source.second_moment())
    weights = choose_weights(inputs, config.rule, (config.alpha,))
    settings = TrainConfig(
        expansion=LATENTS // DIMENSIONS,
        tokens=config.steps * _BATCH,
        batch_size=_BATCH,
        learning_rate=_LEARNING_RATE,
        shuffle_seed=seed,
        device="cpu",
        dtype="float32",
    )
    arms = [ArmConfig(one, k=k, init_seed=seed) for one in weights]
    dictionaries = train(source, arms, settings, out)
    return {one.weights.name: dictionaries[one.name] for one in arms}


def _active(data: Superposition) -> int:
    """Latents on a row."""
    return min(_MOST_ACTIVE, max(1, round(data.mean_active / 2)))


def _features(data: Superposition, rows: int, draw: torch.Generator) -> Float[Tensor, "rows n"]:
    """The true features of ``rows`` rows, without those rows that have none."""
    x = data.features(rows, draw)
    return x[(x > 0).any(1)]


@torch.no_grad()
def _measured(dictionary: Dictionary, data: Superposition, x: Tensor) -> Recovery:
    return measure(dictionary.W_dec, dictionary.encode(data.observe(x)), data.mixing, x)


def _over_seeds(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f} [{min(values):.2f}, {max(values):.2f}]"
