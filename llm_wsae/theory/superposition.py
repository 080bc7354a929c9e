"""Planted data: superposition whose true features are known.

n true features x, sparse and non-negative, are mixed into n_p < n observed dimensions,
x_p = W_p x (Elhage et al. 2022, "Toy Models of Superposition"). A dictionary sees only x_p, and
what it recovers can be compared with x. The mixtures differ in what should matter to a weighted
loss:

- ``digon``: 10 dimensions with one feature each, 10 with an antipodal pair: the position in which
  the closed form is exact;
- ``mixed``: 8 with one feature, 6 digons, and 6 dimensions that hold 18 features of low coherence;
- ``rotated``: the same data in another basis, where no dimension is monosemantic;
- ``toy_model``: W_p trained from scratch to reconstruct x, so that nobody chose which features
  share dimensions.

Frequencies and amplitudes can differ by feature, and a few dimensions can be made outliers.
Features are independent, except in a ``Hierarchy``, where children need their parent, and
``Correlated`` groups. Each has a twin with the same frequencies and relations but independent
features (``hierarchy-off``, ``correlated-off``), so that what the relation does can be told from
what its frequencies do.

``REGIMES`` has these kinds of data by name; a seed has a random stream for each thing drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.weights.scores import participation

NUM_OBSERVED = 20
_TOY_STEPS, _TOY_BATCH, _TOY_RATE = 1500, 512, 1e-2
_COHERENCE_STEPS, _COHERENCE_POWER = 500, 8
# One dimension of each kind: with a lone feature, with a digon, with many features.
OUTLIER_DIMENSIONS = (0, 9, 15)
OUTLIER_FACTOR = 20.0
FAMILIES = 8  # of a parent and two children each
GROUP_SIZE, CORRELATION = 4, 0.8
_STREAMS_PER_SEED = 8  # so that no two seeds share a stream


@dataclass(frozen=True)
class Relations:
    """Which features belong together."""

    group: Int[Tensor, " n"]
    """Number of each feature's group; a feature without relatives is alone in its own."""
    parent: Int[Tensor, " n"] | None = None
    """Number of each feature's parent, −1 for none; None where no feature has one."""


@dataclass(frozen=True)
class Planted:
    """A distribution of true features and how they are mixed: x_p = W_p x."""

    mixing: Float[Tensor, "n_p n"]
    """W_p: column j is the observed direction of true feature j."""
    probability: Float[Tensor, " n"]
    """Probability 1 − S_j that feature j is not 0."""
    amplitude: Float[Tensor, " n"]
    """A feature that is not 0 is uniform on (0, amplitude_j]."""

    @property
    def num_features(self) -> int:
        """n, the number of true features."""
        return self.mixing.shape[1]

    @property
    def mean_active(self) -> float:
        """Mean number of true features that are not 0 in a row."""
        return float(self.probability.sum())

    @property
    def monosemanticity(self) -> Float[Tensor, " n_p"]:
        """True monosemanticity of every dimension: 1/PR of its row of W_p; 1 is one feature."""
        return participation(self.mixing.T)

    def features(self, rows: int, generator: torch.Generator) -> Float[Tensor, "rows n"]:
        """Draw true features x."""
        return features_from_uniform(
            torch.rand(rows, self.num_features, generator=generator, dtype=self.mixing.dtype),
            self.probability,
            self.amplitude,
        )

    def observe(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n_p"]:
        """What a dictionary sees of true features: x_p = W_p x."""
        return x @ self.mixing.T

    def relations(self) -> Relations | None:
        """Which features belong together; None if none do."""
        return None


@dataclass(frozen=True)
class Hierarchy(Planted):
    """Features of which some are children: never active without their parent (one level deep).

    ``probability`` is that of a feature alone, so a child's given its parent is p_child/p_parent.
    A dictionary can save an active latent by writing the parent into its children's latents:
    absorption (Chanin et al. 2024, arXiv 2409.14507).
    """

    parent: Int[Tensor, " n"]
    """Number of each feature's parent, −1 for none."""
    gated: bool = True
    """Whether children need their parent; else all are independent, at the same frequencies."""

    def features(self, rows: int, generator: torch.Generator) -> Float[Tensor, "rows n"]:
        """Draw true features x."""
        if not self.gated:
            return super().features(rows, generator)
        uniform = torch.rand(rows, self.num_features, generator=generator, dtype=self.mixing.dtype)
        is_child = self.parent >= 0
        needed = torch.where(is_child, self.probability[self.parent], 1.0)
        x = features_from_uniform(uniform, self.probability / needed, self.amplitude)
        return torch.where(is_child & (x[:, self.parent] == 0), 0.0, x)

    def relations(self) -> Relations:
        """A parent and its children are a group."""
        own = torch.arange(self.num_features)
        return Relations(torch.where(self.parent >= 0, self.parent, own), self.parent)


@dataclass(frozen=True)
class Correlated(Planted):
    """Features whose groups tend to be active, and strong, together: a Gaussian copula.

    Feature j has the uniform number Φ(√ρ·g + √(1 − ρ)·e_j), g standard normal and shared by its
    group, so each feature alone is what it would be without a group.
    """

    group: Int[Tensor, " n"]
    """Number of each feature's group, below n."""
    correlation: float
    """ρ, the correlation of the normal numbers behind two features of a group, in [0, 1]."""

    def features(self, rows: int, generator: torch.Generator) -> Float[Tensor, "rows n"]:
        """Draw true features x."""
        size, dtype = (rows, self.num_features), self.mixing.dtype
        shared = torch.randn(size, generator=generator, dtype=dtype)[:, self.group]
        own = torch.randn(size, generator=generator, dtype=dtype)
        normal = self.correlation**0.5 * shared + (1 - self.correlation) ** 0.5 * own
        uniform = torch.special.ndtr(normal)
        return features_from_uniform(uniform, self.probability, self.amplitude)

    def relations(self) -> Relations:
        """The groups."""
        return Relations(self.group)


def features_from_uniform(
    uniform: Float[Tensor, "*rows n"],
    probability: Float[Tensor, "*groups n"],
    amplitude: Float[Tensor, "*groups n"],
) -> Float[Tensor, "*rows n"]:
    """True features from one uniform number each: a feature is active if its number is below the
    probability, and the further below, the stronger. The same numbers at another sparsity give
    comparable rows."""
    active = uniform < probability  # never if the probability is 0, where the quotient is none
    return torch.where(active, (1 - uniform / probability) * amplitude, 0.0)


def planted(mixing: Float[Tensor, "n_p n"], sparsity: float) -> Planted:
    """Features of equal probability 1 − sparsity and amplitude 1, mixed by ``mixing``."""
    n = mixing.shape[1]
    ones = torch.ones(n, dtype=mixing.dtype)
    return Planted(mixing, ones * (1 - sparsity), ones)


def digon_mixing(singles: int = 10, digons: int = 10) -> Float[Tensor, "n_p n"]:
    """W_p with one feature alone on each of the first dimensions, an antipodal pair on the rest."""
    mixing = torch.zeros(singles + digons, singles + 2 * digons)
    mixing[:singles, :singles] = torch.eye(singles)
    for i in range(digons):
        mixing[singles + i, singles + 2 * i] = 1
        mixing[singles + i, singles + 2 * i + 1] = -1
    return mixing


def mixed_mixing(generator: torch.Generator) -> Float[Tensor, "n_p n"]:
    """W_p of 8 dimensions with one feature each, 6 digons, and 6 dimensions that together hold 18
    features: n_p = 20, n = 38."""
    return torch.block_diag(digon_mixing(8, 6), low_coherence(6, 18, generator))


def low_coherence(
    dimensions: int, count: int, generator: torch.Generator
) -> Float[Tensor, "dimensions count"]:
    """Unit columns whose largest |cosine| is reduced by gradient descent on a high power of it."""
    free = torch.randn(dimensions, count, generator=generator).requires_grad_()
    optimiser = torch.optim.Adam([free], lr=0.02)
    for _ in range(_COHERENCE_STEPS):
        unit = free / free.norm(dim=0)
        cosine = unit.T @ unit - torch.eye(count)
        optimiser.zero_grad()
        (cosine.abs() ** _COHERENCE_POWER).sum().backward()
        optimiser.step()
    with torch.no_grad():
        return free / free.norm(dim=0)


def rotated(data: Planted, generator: torch.Generator) -> Planted:
    """The same features under a random rotation of the observed space (Haar)."""
    n_p = len(data.mixing)
    q, r = torch.linalg.qr(torch.randn(n_p, n_p, generator=generator, dtype=torch.float64))
    q = (q * r.diagonal().sign()).to(data.mixing.dtype)
    return replace(data, mixing=q @ data.mixing)


def outliers(data: Planted, dimensions: Sequence[int], factor: float) -> Planted:
    """Some observed dimensions ``factor`` times as large, as in a residual stream."""
    scale = torch.ones(len(data.mixing), 1, dtype=data.mixing.dtype)
    scale[list(dimensions)] = factor
    return replace(data, mixing=scale * data.mixing)


def alone(data: Planted) -> Int[Tensor, " alone"]:
    """Indices of the true features that have a dimension to themselves."""
    touched = data.mixing != 0
    private = touched & (touched.sum(1, keepdim=True) == 1)
    return (private.any(0) & (touched.sum(0) == 1)).nonzero()[:, 0]


def more_frequent(data: Planted, which: Int[Tensor, " some"], factor: float) -> Planted:
    """Some features ``factor`` times as frequent, at most always on."""
    probability = data.probability.clone()
    probability[which] = (probability[which] * factor).clamp(max=1.0)
    return replace(data, probability=probability)


def stronger(data: Planted, which: Int[Tensor, " some"], factor: float) -> Planted:
    """Some features ``factor`` times as strong."""
    amplitude = data.amplitude.clone()
    amplitude[which] *= factor
    return replace(data, amplitude=amplitude)


def toy_model(
    n: int, n_p: int, sparsity: float, generator: torch.Generator, steps: int = _TOY_STEPS
) -> Float[Tensor, "n_p n"]:
    """W_p of a toy model of superposition trained from scratch.

    W_p = argmin E‖x − ReLU(W_pᵀ W_p x)‖², all features equally important, no bias (the setting of
    Cui et al. 2026; Elhage et al. 2022 with the bias left out), by Adam whose rate falls to 0.
    """
    data = planted(torch.empty(n_p, n), sparsity)
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


def hierarchy(data: Planted, generator: torch.Generator, gated: bool = True) -> Hierarchy:
    """``FAMILIES`` parents with two children each, drawn at random; the other features are alone.

    A parent is twice as frequent as its features were (at most always on), so that its children,
    each active in half of its rows or more, keep their frequency.
    """
    n = data.num_features
    members = torch.randperm(n, generator=generator)[: 3 * FAMILIES].view(FAMILIES, 3)
    parent = torch.full((n,), -1)
    parent[members[:, 1:]] = members[:, :1].expand(-1, 2)
    common = more_frequent(data, members[:, 0], 2.0)
    return Hierarchy(data.mixing, common.probability, data.amplitude, parent, gated)


def correlated(data: Planted, generator: torch.Generator, correlation: float) -> Correlated:
    """Groups of ``GROUP_SIZE`` features drawn at random, correlated with ``correlation``."""
    order = torch.randperm(data.num_features, generator=generator)
    group = torch.empty_like(order)
    group[order] = torch.arange(data.num_features) // GROUP_SIZE
    return Correlated(data.mixing, data.probability, data.amplitude, group, correlation)


Regime = Callable[[float, torch.Generator], Planted]


def _digon(sparsity: float, generator: torch.Generator) -> Planted:
    return planted(digon_mixing(), sparsity)


def _mixed(sparsity: float, generator: torch.Generator) -> Planted:
    return planted(mixed_mixing(generator), sparsity)


def _rotated(sparsity: float, generator: torch.Generator) -> Planted:
    return rotated(_digon(sparsity, generator), generator)


def _frequent(sparsity: float, generator: torch.Generator) -> Planted:
    data = _mixed(sparsity, generator)
    return more_frequent(data, alone(data), 3.0)


def _strong(sparsity: float, generator: torch.Generator) -> Planted:
    data = _mixed(sparsity, generator)
    return stronger(data, alone(data), 2.0)


def _outliers(sparsity: float, generator: torch.Generator) -> Planted:
    return outliers(_mixed(sparsity, generator), OUTLIER_DIMENSIONS, OUTLIER_FACTOR)


def _hierarchy(gated: bool) -> Regime:
    def build(sparsity: float, generator: torch.Generator) -> Planted:
        return hierarchy(_mixed(sparsity, generator), generator, gated)

    return build


def _correlated(correlation: float) -> Regime:
    def build(sparsity: float, generator: torch.Generator) -> Planted:
        return correlated(_mixed(sparsity, generator), generator, correlation)

    return build


def _digons(sparsity: float, generator: torch.Generator) -> Planted:
    return rotated(planted(digon_mixing(0, NUM_OBSERVED), sparsity), generator)


def _crowd(n: int) -> Regime:
    def build(sparsity: float, generator: torch.Generator) -> Planted:
        return planted(low_coherence(NUM_OBSERVED, n, generator), sparsity)

    return build


def _toy(n: int) -> Regime:
    def build(sparsity: float, generator: torch.Generator) -> Planted:
        return planted(toy_model(n, NUM_OBSERVED, sparsity, generator), sparsity)

    return build


REGIMES: dict[str, Regime] = {
    "digon": _digon,
    "mixed": _mixed,
    "rotated": _rotated,
    "frequent": _frequent,
    "strong": _strong,
    "outliers": _outliers,
    "hierarchy": _hierarchy(gated=True),
    "hierarchy-off": _hierarchy(gated=False),
    "correlated": _correlated(CORRELATION),
    "correlated-off": _correlated(0.0),
    "digons-40": _digons,
    "crowd-60": _crowd(60),
    "crowd-200": _crowd(200),
    "toy-40": _toy(40),
    "toy-200": _toy(200),
}


class Stream(IntEnum):
    """What is drawn."""

    DATA = 0
    """The mixture: W_p and everything else that is random about the data."""
    SAMPLE = 1
    """Rows that rules are computed from."""
    TRAIN = 2
    """The initial weights of a training and its batches."""
    TEST = 3
    """Rows that dictionaries are measured on."""
    CONTROL = 4
    """The controls' weights."""
    STRANGERS = 5
    """Random rows, with which those of a dimension are compared."""


def number(seed: int, stream: Stream) -> int:
    """The stream's own seed."""
    return seed * _STREAMS_PER_SEED + stream


def generator(seed: int, stream: Stream) -> torch.Generator:
    """A fresh generator of the stream."""
    return torch.Generator().manual_seed(number(seed, stream))
