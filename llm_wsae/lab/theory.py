"""The closed form of Cui et al. 2026 (arXiv 2506.15963), and the weights that close its gap.

n true features x ≥ 0, sparse and independent, are mixed into n_p < n observed dimensions,
x_p = W_p x. A tied sparse autoencoder W_m encodes x_m = ReLU(W_m x_p) and reconstructs
x̂_p = W_mᵀ x_m. With W_m = (W_p, 0)ᵀ what it recovers of x is r = ReLU(W_pᵀ W_p x). How far its
loss on x_p is from the loss on x that one wants is a quadratic form in x − r, whose matrix is
W_pᵀΓ²W_p − I for a loss with weights Γ (theorems 4 and 5).

The closed form is an optimum for antipodal pairs (digons) at any sparsity, and for three features
at 120° on 1-sparse inputs alone. With n_m ≥ 2·n_p the dictionary (Q, −Q)ᵀ of *any* orthogonal Q
reconstructs everything, so something else must choose: a penalty or TopK.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import UsageError

Weights = Float[Tensor, "n_p"] | Float[Tensor, "n_p n_p"]  # γ, or the whole matrix Γ

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
    """W_p of a toy model of superposition, trained from scratch by Adam whose rate falls to 0.

    W_p = argmin E‖x − ReLU(W_pᵀ W_p x)‖², all features equally important, no bias (the setting of
    Cui et al. 2026; Elhage et al. 2022 with the bias left out).
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


def gap_matrix(
    mixing: Float[Tensor, "n_p n"], weights: Weights | None = None
) -> Float[Tensor, "n n"]:
    """W_pᵀ ΓᵀΓ W_p − I (theorem 5; theorem 4 without weights): 0 would close the gap."""
    return _gram(mixing, weights) - torch.eye(mixing.shape[1], dtype=mixing.dtype)


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


@dataclass(frozen=True)
class GapNorms:
    """‖W_pᵀΓ²W_p − I‖_F for one W_p: weights beside the scale alone, the optimum and the bound."""

    none: float
    """Γ = I."""
    best_scalar: float
    """The best multiple of I."""
    weights: dict[str, float]
    """By name of the weights: at their best scale, since a loss has its minimum at any."""
    whitening: float
    """Γ², the pseudo-inverse of W_p W_pᵀ (``least_gap_weights``)."""
    bound: float
    """√(n − rank W_p); no Γ is below."""


def gap_norms(mixing: Float[Tensor, "n_p n"], weights: dict[str, Weights]) -> GapNorms:
    """The norms for W_p and each of the weights γ [n_p] or Γ [n_p, n_p], in float64. Raises
    UsageError if W_p is 0."""
    mixing = mixing.double()
    return GapNorms(
        none=float(gap_matrix(mixing).norm()),
        best_scalar=_at_best_scale(mixing, None),
        weights={name: _at_best_scale(mixing, one.double()) for name, one in weights.items()},
        whitening=float(gap_matrix(mixing, least_gap_weights(mixing)).norm()),
        bound=(mixing.shape[1] - int(_spectrum(mixing)[2].sum())) ** 0.5,
    )


def _gram(mixing: Tensor, weights: Tensor | None) -> Tensor:
    """W_pᵀ ΓᵀΓ W_p."""
    seen = mixing.T
    if weights is not None:
        seen = seen * weights if weights.ndim == 1 else seen @ weights.T
    return seen @ seen.T


def _at_best_scale(mixing: Tensor, weights: Tensor | None) -> float:
    """‖c²G − I‖_F, G = W_pᵀΓ²W_p, at c² = tr G/‖G‖_F², or 0 for 0."""
    gram = _gram(mixing, weights)
    square = float(gram.square().sum())
    scale = float(gram.trace() / square) ** 0.5 if square > 0 else 0.0
    return float((scale**2 * gram - torch.eye(len(gram), dtype=torch.float64)).norm())


def _spectrum(mixing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and eigenvectors of W_p W_pᵀ (float64), and which of them are not 0."""
    values, vectors = torch.linalg.eigh(mixing.double() @ mixing.double().T)
    if not float(values[-1]) > 0:
        raise UsageError("W_p is 0: it mixes no feature into any dimension")
    return values, vectors, values > _RANK_TOLERANCE * values[-1]
