"""The closed form of Cui et al. 2026 (arXiv 2506.15963), and the weights that close its gap.

n true features x ≥ 0, sparse and independent, are mixed into n_p < n observed dimensions,
x_p = W_p x. A tied sparse autoencoder W_m encodes x_m = ReLU(W_m x_p) and reconstructs
x̂_p = W_mᵀ x_m. With W_m = (W_p, 0)ᵀ what it recovers of x is r = ReLU(W_pᵀ W_p x). How far its
loss on x_p is from the loss on x that one wants is a quadratic form in x − r, whose matrix is
W_pᵀΓ²W_p − I for a loss with weights Γ (theorems 4 and 5).

The closed form is an optimum for antipodal pairs (digons) at any sparsity, and for three features
at 120° on 1-sparse inputs alone. With n_m ≥ 2·n_p the dictionary (Q, −Q)ᵀ of *any* orthogonal Q
reconstructs everything, so something else must choose: a penalty or TopK.

The paper's toy experiment is repeated with the trainer of this package. A toy model of
superposition puts 200 sparse features into 20 dimensions, and dictionaries of 200 latents, half as
many of them active as there are features on average, are trained on what it makes of them: plain
ones and weighted ones, on the same rows. Beside them stand the closed form, which knows the truth,
and random directions, which are untrained.
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
from llm_wsae.data.rows import ArrayRows
from llm_wsae.errors import UsageError
from llm_wsae.evaluation.baselines import frozen_random
from llm_wsae.lab.config import TheoryConfig
from llm_wsae.terminal import Table
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.trainer import train
from llm_wsae.weights.loss_weights import choose_weights
from llm_wsae.weights.weighing import measure_inputs

COMMAND, REPORT = "theory", "theory.json"
FEATURES, DIMENSIONS, LATENTS = 200, 20, 200
"""n, n_p and n_m of the paper."""
CLOSED_FORM, RANDOM = "closed form", "random directions"
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
Weights = Float[Tensor, "n_p"] | Float[Tensor, "n_p n_p"]  # γ, or the whole matrix Γ

_RANK_TOLERANCE = 1e-10  # of the largest eigenvalue of W_p W_pᵀ
_TOY_BATCH, _TOY_RATE = 512, 1e-2


@dataclass(frozen=True)
class Superposition:
    """Independent true features of equal frequency and strength, and how they are mixed:
    x_p = W_p x (Elhage et al. 2022, "Toy Models of Superposition")."""

    mixing: Float[Tensor, "n_p n"]  # W_p: column j is the observed direction of true feature j
    sparsity: float  # S, the probability that a feature is 0; otherwise it is uniform on (0, 1]

    def features(self, rows: int, generator: torch.Generator) -> Float[Tensor, "rows n"]:
        """Draw true features x."""
        size, dtype = (rows, self.mixing.shape[1]), self.mixing.dtype
        uniform = torch.rand(size, generator=generator, dtype=dtype)
        if self.sparsity == 1:
            return torch.zeros_like(uniform)
        return (1 - uniform / (1 - self.sparsity)).clamp(min=0)

    def observe(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n_p"]:
        """What a dictionary sees of true features: x_p = W_p x."""
        return x @ self.mixing.T


def toy_model(
    n: int, n_p: int, sparsity: float, generator: torch.Generator, steps: int = 1500
) -> Float[Tensor, "n_p n"]:
    """W_p of a toy model of superposition: argmin E‖x − ReLU(W_pᵀ W_p x)‖², trained from scratch by
    Adam whose rate falls to 0. All features are equally important, and there is no bias (the
    setting of Cui et al. 2026; Elhage et al. 2022 with the bias left out)."""
    data = Superposition(torch.empty(n_p, n), sparsity)
    mixing = (torch.randn(n_p, n, generator=generator) / n_p**0.5).requires_grad_()
    optimiser = torch.optim.Adam([mixing], lr=_TOY_RATE)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = _TOY_RATE * (1 - step / steps)
        x = data.features(_TOY_BATCH, generator)
        optimiser.zero_grad()
        missed = x - ((x @ mixing.T) @ mixing).relu()
        (missed.square().sum() / _TOY_BATCH).backward()
        optimiser.step()
    return mixing.detach()


def recovered(
    mixing: Float[Tensor, "n_p n"], x: Float[Tensor, "rows n"]
) -> Float[Tensor, "rows n"]:
    """r = ReLU(W_pᵀ W_p x), what the closed form recovers of the true features (theorem 1)."""
    return (x @ (mixing.T @ mixing)).relu()


def gap_matrix(
    mixing: Float[Tensor, "n_p n"], weights: Weights | None = None
) -> Float[Tensor, "n n"]:
    """W_pᵀ ΓᵀΓ W_p − I (theorem 5; theorem 4 without weights), float64: 0 would close the gap. Its
    norm says how far weights are from that."""
    seen = mixing.T.double()
    if weights is not None:
        seen = seen * weights if weights.ndim == 1 else seen @ weights.double().T
    return seen @ seen.T - torch.eye(len(seen), dtype=torch.float64)


def least_gap_weights(mixing: Float[Tensor, "n_p n"]) -> Float[Tensor, "n_p n_p"]:
    """Theorem 5's optimum: the Γ* with Γ*² = (W_p W_pᵀ)⁺, which minimises ‖W_pᵀΓ²W_p − I‖_F.

    W_pᵀΓ²W_p is positive semidefinite with rank ≤ r = rank W_p, so its distance from I is at least
    √(n − r) (Eckart & Young 1936). At Γ* it is W_p⁺W_p, the projection on the row space of W_p, at
    just that distance. For independent features of equal variance W_p W_pᵀ is proportional to the
    covariance of x_p, so Γ* whitens; for orthogonal rows of W_p it is diagonal, γ_i = 1/σ_i. Where
    W_p lacks full rank, Γ* is 0 in the directions that no feature reaches. Symmetric, float64.

    Raises UsageError if W_p is 0.
    """
    values, vectors = torch.linalg.eigh(mixing.double() @ mixing.double().T)
    if not float(values[-1]) > 0:
        raise UsageError("W_p is 0: it mixes no feature into any dimension")
    kept = values > _RANK_TOLERANCE * values[-1]
    roots = torch.where(kept, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    return (vectors * roots) @ vectors.T


class Recovery(NamedTuple):
    """How much of the true features a dictionary finds, where they are known."""

    recovered: float  # share of true features with a decoder row at a cosine above 0.9
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
    and ``theory.json``. Raises as ``train`` does."""
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
    source = ArrayRows(data.observe(_features(data, _TRAIN_ROWS, draw)))
    x = _features(data, _TEST_ROWS, draw)
    k = min(_MOST_ACTIVE, max(1, round(FEATURES * (1 - sparsity) / 2)))
    inputs = measure_inputs(config.rule, source)
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
    dictionaries[RANDOM] = frozen_random(like, inputs.statistics.mean.float(), float(k), seed)
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
