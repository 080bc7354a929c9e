"""The toy experiment of Cui et al. 2026, with the trainer of this package.

A toy model of superposition puts 200 sparse features into 20 dimensions, and dictionaries of 200
latents are trained on what it makes of them: plain ones and weighted ones, on the same rows. The
features are known, so each dictionary can be compared with the truth. Beside them stand the closed
form W_pᵀ of theorem 1, which knows the truth, and random directions, which are untrained.

A dictionary is TopK with half as many latents on a row as there are features on average. With a
ReLU alone, 200 latents reconstruct 20 dimensions from other directions than the true ones, at any
sparsity.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from llm_wsae.artifact.artifact import check_file, check_folder, is_record_of
from llm_wsae.artifact.files import write_json
from llm_wsae.artifact.provenance import plain, versions
from llm_wsae.data.shuffling import MemorySource
from llm_wsae.errors import UsageError
from llm_wsae.evaluation.baselines import frozen_random
from llm_wsae.lab.config import TheoryConfig
from llm_wsae.lab.theory import Superposition, recovered, toy_model
from llm_wsae.model.site import Site
from llm_wsae.terminal import Table
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
_TRAIN_ROWS, _TEST_ROWS, _BATCH = 50_000, 10_000, 256
_LEARNING_RATE = 0.01  # at Adam's usual 0.001 plain dictionaries are not finished
_FAR = 1_000_003  # from the seeds of initial weights, which would begin as the features do
_MOST_ACTIVE = DIMENSIONS // 2  # more latents reconstruct a row whatever their directions
_FOUND_COSINE = 0.9
_TITLES = {"mmcs": "MMCS", "l_gt": "L_GT", "features_per_latent": "features/latent"}
_MEANINGS = {
    "recovered": "share of the true features with a decoder row at a cosine above 0.9",
    "MMCS": "mean over features of the largest cosine with a decoder row",
    "L_GT": "share of the features' energy that is missing when each is read from its own latent",
    "features/latent": "true features that a latent answers to (1: monosemantic)",
}


class Recovery(NamedTuple):
    """How much of the true features a dictionary finds, where they are known."""

    recovered: float
    """Share of true features with a decoder row at a cosine above 0.9."""
    mmcs: float
    """Mean over true features of the largest cosine between its direction and a decoder row
    (Sharkey et al. 2022); the sign counts, since latents are not negative."""
    l_gt: float
    features_per_latent: float


@dataclass(frozen=True)
class ToyReport:
    """What every dictionary finds, at every sparsity."""

    config: TheoryConfig
    found: dict[float, dict[str, list[Recovery]]]
    """By sparsity and name of the dictionary: one for every seed."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = {
            f"{sparsity:g}": {name: [one._asdict() for one in own] for name, own in named.items()}
            for sparsity, named in self.found.items()
        }
        return {"config": plain(self.config), "found": plain(found)}

    def table(self) -> str:
        """Means over seeds, with the least and the most, and the meaning of each column."""
        rows = [["S", "dictionary", *(_TITLES.get(name, name) for name in Recovery._fields)]]
        for sparsity, by_name in self.found.items():
            for name, of_seeds in by_name.items():
                cells = [
                    f"{sum(values) / len(values):.2f} [{min(values):.2f}, {max(values):.2f}]"
                    for values in zip(*of_seeds, strict=True)
                ]
                rows.append([f"{sparsity:g}", name, *cells])
        return Table(rows, left=2, meanings=_MEANINGS).text()


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


@torch.no_grad()
def measure(
    decoder: Float[Tensor, "latents n_p"],
    codes: Float[Tensor, "rows latents"],
    mixing: Float[Tensor, "n_p n"],
    x: Float[Tensor, "rows n"],
) -> Recovery:
    """Compare a dictionary's decoder, and its codes of W_p x, with W_p and x."""
    largest = (_unit(decoder.T).T @ _unit(mixing)).amax(0)
    return Recovery(
        recovered=float((largest > _FOUND_COSINE).float().mean()),
        mmcs=float(largest.mean()),
        l_gt=matched_loss(codes, x),
        features_per_latent=features_per_latent(codes, x),
    )


def matched_loss(codes: Float[Tensor, "rows latents"], x: Float[Tensor, "rows n"]) -> float:
    """min over matchings and scales of E‖x − c∘z_match‖² / E‖x‖²: share of the true features'
    energy that is missing when each is matched to at most one latent, at its best scale c.

    That scale is ⟨x_j, z_l⟩/‖z_l‖², which removes ⟨x_j, z_l⟩²/‖z_l‖² of ‖x_j‖²; the matching that
    removes most is an assignment problem (Kuhn 1955, "Hungarian").
    """
    power = codes.double().square().sum(0)
    product = x.double().T @ codes.double()
    removed = product.square() / torch.where(power > 0, power, 1.0)
    rows, columns = linear_sum_assignment(removed.numpy(), maximize=True)
    return 1 - float(removed[rows, columns].sum() / x.double().square().sum())


def features_per_latent(codes: Float[Tensor, "rows latents"], x: Float[Tensor, "rows n"]) -> float:
    """Mean participation ratio (Σ_j ρ²)²/Σ_j ρ⁴ of a latent's correlations ρ with the features; NaN
    if all are constant. 1 is a monosemantic latent. Latents are weighted by their variance: spare
    ones that fire on a few rows correlate with all features by chance."""
    z, features = (codes - codes.mean(0)).double(), (x - x.mean(0)).double()
    spread = z.norm(dim=0)
    alive = spread > 0
    if not bool(alive.any()):
        return float("nan")
    rho = (_unit(z[:, alive]).T @ _unit(features)).square()
    ratio = rho.sum(1).square() / rho.square().sum(1)
    share = spread[alive].square()
    return float((ratio * share).sum() / share.sum())


def _compared(config: TheoryConfig, sparsity: float, seed: int, out: Path) -> dict[str, Recovery]:
    """What every dictionary of one toy model finds."""
    draw = torch.Generator().manual_seed(_FAR + seed)
    mixing = toy_model(FEATURES, DIMENSIONS, sparsity, draw, steps=3 * config.steps // 4)
    data = Superposition(mixing, sparsity)
    source = MemorySource(data.observe(_features(data, _TRAIN_ROWS, draw)), _SITE)
    x = _features(data, _TEST_ROWS, draw)
    k = min(_MOST_ACTIVE, max(1, round(FEATURES * (1 - sparsity) / 2)))
    statistics = source.statistics()
    inputs = RuleInputs(statistics, second_moment=source.second_moment())
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
    trained = train(source, arms, settings, out / f"S{sparsity:g}-seed{seed}")
    dictionaries = {one.weights.name: trained[one.name] for one in arms}
    like = next(iter(dictionaries.values()))
    dictionaries[RANDOM] = frozen_random(like, statistics.mean.float(), float(k), seed)
    found = {
        name: measure(one.W_dec, one.encode(data.observe(x)), mixing, x)
        for name, one in dictionaries.items()
    }
    return found | {CLOSED_FORM: measure(mixing.T, recovered(mixing, x), mixing, x)}


def _features(data: Superposition, rows: int, draw: torch.Generator) -> Float[Tensor, "rows n"]:
    """The true features of ``rows`` rows, without those rows that have none."""
    x = data.features(rows, draw)
    return x[(x > 0).any(1)]


def _unit(columns: Tensor) -> Tensor:
    """Columns at length 1; those of length 0 stay."""
    return columns / columns.norm(dim=0).clamp(min=1e-12)
