"""The closed form of Cui et al. 2026 (arXiv 2506.15963), when it can be trained, and its weights.

n true features x ≥ 0, sparse and independent, are mixed into n_p < n observed dimensions,
x_p = W_p x. A tied sparse autoencoder W_m encodes x_m = ReLU(W_m x_p) and reconstructs
x̂_p = W_mᵀ x_m. With W_m = (W_p, 0)ᵀ what it recovers of x is

    r = ReLU(W_pᵀ W_p x),

and everything below follows from r: which features shrink, which vanish, and how far the training
loss (on x_p) is from the loss one wants (on x).

Where it is the optimum (theorem 1) and the only one (theorem 3), for a ReLU without a penalty on
the codes, as the tests of this module establish:

- in antipodal pairs (digons) the reconstruction is exact at any sparsity, so it is optimal;
- three features at 120° leave a loss on dense inputs, where W_pᵀ is not even a local optimum; on
  1-sparse inputs it is optimal;
- only a single digon has a unique optimum. With n_m ≥ 2·n_p the dictionary (Q, −Q)ᵀ of *any*
  orthogonal Q reconstructs everything: something else must choose, a penalty or TopK.

Of theorem 5's matrix W_pᵀΓ²W_p − I a norm says little alone: a single number c·I already makes it
smaller, and no Γ makes it 0 where there are more features than dimensions. So ``gap_norms`` puts
beside the norm what the best scalar leaves, what the best matrix leaves, and the bound.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import UsageError

Weights = Float[Tensor, "n_p"] | Float[Tensor, "n_p n_p"]  # γ, or the whole matrix Γ

_TOLERANCE = 1e-6
_RANK_TOLERANCE = 1e-10  # of the largest eigenvalue of W_p W_pᵀ
_TOY_BATCH, _TOY_RATE = 512, 1e-2


@dataclass(frozen=True)
class Superposition:
    """Independent true features of equal frequency and strength, and how they are mixed:
    x_p = W_p x (Elhage et al. 2022, "Toy Models of Superposition")."""

    mixing: Float[Tensor, "n_p n"]
    """W_p: column j is the observed direction of true feature j."""
    sparsity: float
    """S, the probability that a feature is 0; otherwise it is uniform on (0, 1]."""

    @property
    def mean_active(self) -> float:
        """Mean number of true features that are not 0 in a row."""
        return self.mixing.shape[1] * (1 - self.sparsity)

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


def digon_mixing(singles: int, digons: int) -> Float[Tensor, "n_p n"]:
    """W_p with one feature alone on each of the first dimensions, an antipodal pair on the rest:
    the position in which the closed form is exact."""
    mixing = torch.zeros(singles + digons, singles + 2 * digons)
    mixing[:singles, :singles] = torch.eye(singles)
    for i in range(digons):
        mixing[singles + i, singles + 2 * i] = 1
        mixing[singles + i, singles + 2 * i + 1] = -1
    return mixing


def toy_model(
    n: int, n_p: int, sparsity: float, generator: torch.Generator, steps: int = 1500
) -> Float[Tensor, "n_p n"]:
    """W_p of a toy model of superposition trained from scratch, so that nobody chose which features
    share dimensions.

    W_p = argmin E‖x − ReLU(W_pᵀ W_p x)‖², all features equally important, no bias (the setting of
    Cui et al. 2026; Elhage et al. 2022 with the bias left out), by Adam whose rate falls to 0.
    """
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


def losses(
    mixing: Float[Tensor, "n_p n"], x: Float[Tensor, "rows n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Feature shrinking and feature vanishing (Cui et al. 2026, §3.2): of the rows where a feature
    is active, the share on which 0 < r < x, and that on which r = 0; NaN if there is none."""
    r, active = recovered(mixing, x), x > 0
    # A relative margin: rounding must not count as shrinking where recovery is exact.
    shrunk = active & (r > 0) & (r < x * (1 - _TOLERANCE))
    vanished = active & (r == 0)
    return shrunk.sum(0) / active.sum(0), vanished.sum(0) / active.sum(0)


def assumptions_hold(mixing: Float[Tensor, "n_p n"]) -> bool:
    """Whether W_p is in the position that theorem 1 assumes: columns of length 1, or below 1e-6,
    which counts as 0, without positive inner products.

    At most 2·n_p vectors of an n_p-dimensional space have pairwise non-positive inner products
    (the axes and their opposites reach it), so n > 2·n_p rules the assumption out.
    """
    norms = mixing.norm(dim=0)
    present = norms > _TOLERANCE
    gram = mixing[:, present].T @ mixing[:, present]
    interference = gram - torch.diag(gram.diagonal())
    is_unit = (norms[present] - 1).abs() <= _TOLERANCE
    return bool(is_unit.all() and (interference <= _TOLERANCE).all())


def sae_loss(
    dictionary: Float[Tensor, "latents n_p"],
    x_p: Float[Tensor, "rows n_p"],
    weights: Weights | None = None,
) -> Float[Tensor, ""]:
    """L_SAE = E‖x_p − W_mᵀ ReLU(W_m x_p)‖² of a tied dictionary W_m; with weights the weighted
    L_WSAE = E‖Γ(x_p − x̂_p)‖²."""
    error = x_p - (x_p @ dictionary.T).relu() @ dictionary
    return _weighted(error, weights).square().sum(1).mean()


def truth_loss(mixing: Float[Tensor, "n_p n"], x: Float[Tensor, "rows n"]) -> Float[Tensor, ""]:
    """L_GT = E‖x − r‖², the loss on the true features at W_m = (W_p, 0)ᵀ. Over E‖x‖² it falls to 0
    as S → 1 (theorem 2)."""
    return (x - recovered(mixing, x)).square().sum(1).mean()


def loss_gap(
    mixing: Float[Tensor, "n_p n"], x: Float[Tensor, "rows n"], weights: Weights | None = None
) -> Float[Tensor, ""]:
    """L_WSAE − L_GT = E (x − r)ᵀ (W_pᵀ ΓᵀΓ W_p − I)(x − r) at the closed form (theorems 4, 5)."""
    lost = x - recovered(mixing, x)
    return ((lost @ gap_matrix(mixing, weights)) * lost).sum(1).mean()


def gap_matrix(
    mixing: Float[Tensor, "n_p n"], weights: Weights | None = None
) -> Float[Tensor, "n n"]:
    """W_pᵀ ΓᵀΓ W_p − I (theorem 5; theorem 4 without weights): 0 would close the gap."""
    seen = _weighted(mixing.T, weights)
    return seen @ seen.T - torch.eye(mixing.shape[1], dtype=mixing.dtype)


def least_gap_weights(mixing: Float[Tensor, "n_p n"]) -> Float[Tensor, "n_p n_p"]:
    """Theorem 5's optimum: the Γ* with Γ*² = (W_p W_pᵀ)⁺, which minimises ‖W_pᵀΓ²W_p − I‖_F.

    W_pᵀΓ²W_p is positive semidefinite with rank ≤ r = rank W_p, so its distance from I is at least
    √(n − r) (Eckart & Young 1936). At Γ* it is W_p⁺W_p, the projection on the row space of W_p, at
    just that distance. For independent features of equal variance W_p W_pᵀ is proportional to the
    covariance of x_p, so Γ* whitens; for orthogonal rows of W_p it is diagonal, γ_i = 1/σ_i. Where
    W_p lacks full rank, Γ* is 0 in the directions that no feature reaches. Symmetric, float64.

    Raises UsageError if W_p is 0.
    """
    values, vectors, kept = _spectrum(mixing)
    roots = torch.where(kept, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    return (vectors * roots) @ vectors.T


def best_scaled_gap_norm(mixing: Float[Tensor, "n_p n"], weights: Weights | None = None) -> float:
    """‖c²G − I‖_F, G = W_pᵀΓ²W_p, at the best scale of the weights: c² = tr G/‖G‖_F², or 0 for 0.

    A loss has the same minimum at any scale of its weights, so this compares weights.
    """
    seen = _weighted(mixing.double().T, None if weights is None else weights.double())
    gram = seen @ seen.T
    square = float(gram.square().sum())
    scale = float(gram.trace() / square) ** 0.5 if square > 0 else 0.0
    return float((scale**2 * gram - torch.eye(len(gram), dtype=torch.float64)).norm())


@dataclass(frozen=True)
class GapNorms:
    """‖W_pᵀΓ²W_p − I‖_F for one W_p: weights beside the scale alone, the optimum and the bound."""

    none: float
    """Γ = I."""
    best_scalar: float
    """The best multiple of I."""
    weights: dict[str, float]
    """By name of the weights: at their best scale."""
    whitening: float
    """Γ², the pseudo-inverse of W_p W_pᵀ (``least_gap_weights``)."""
    bound: float
    """√(n − rank W_p); no Γ is below."""


def gap_norms(mixing: Float[Tensor, "n_p n"], weights: dict[str, Weights]) -> GapNorms:
    """The norms for W_p and each of the weights γ [n_p] or Γ [n_p, n_p]. Computed in float64.

    Raises UsageError if W_p is 0.
    """
    mixing = mixing.double()
    return GapNorms(
        none=float(gap_matrix(mixing).norm()),
        best_scalar=best_scaled_gap_norm(mixing),
        weights={name: best_scaled_gap_norm(mixing, w) for name, w in weights.items()},
        whitening=float(gap_matrix(mixing, least_gap_weights(mixing)).norm()),
        bound=(mixing.shape[1] - int(_spectrum(mixing)[2].sum())) ** 0.5,
    )


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Rows x_p as Γx_p; the rows themselves without weights."""
    if weights is None:
        return rows
    return rows * weights if weights.ndim == 1 else rows @ weights.T


def _spectrum(mixing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and eigenvectors of W_p W_pᵀ (float64), and which of them are not 0."""
    values, vectors = torch.linalg.eigh(mixing.double() @ mixing.double().T)
    if not float(values[-1]) > 0:
        raise UsageError("W_p is 0: it mixes no feature into any dimension")
    return values, vectors, values > _RANK_TOLERANCE * values[-1]
