"""The gap's matrix W_pᵀΓ²W_p − I of theorem 5 (Cui et al. 2026, arXiv 2506.15963), and its optimum.

A norm of it says little alone. A single number c·I already makes it smaller, and no Γ makes it 0
where there are more features than dimensions. So ``gap_norms`` puts beside the norm what the best
scalar leaves, what the best matrix leaves, and the bound.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import UsageError

Weights = Float[Tensor, "n_p"] | Float[Tensor, "n_p n_p"]  # γ, or the whole matrix Γ

_RANK_TOLERANCE = 1e-10  # of the largest eigenvalue of W_p W_pᵀ


def weighted(rows: Float[Tensor, "rows n_p"], weights: Weights | None) -> Float[Tensor, "rows n_p"]:
    """Rows x_p as Γx_p; the rows themselves without weights."""
    if weights is None:
        return rows
    return rows * weights if weights.ndim == 1 else rows @ weights.T


def gap_matrix(
    mixing: Float[Tensor, "n_p n"], weights: Weights | None = None
) -> Float[Tensor, "n n"]:
    """W_pᵀ ΓᵀΓ W_p − I (theorem 5; theorem 4 without weights): 0 would close the gap."""
    seen = weighted(mixing.T, weights)
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


def least_gap_norm(mixing: Float[Tensor, "n_p n"]) -> float:
    """√(n − rank W_p), the smallest ‖W_pᵀΓ²W_p − I‖_F of all Γ (``least_gap_weights``)."""
    return (mixing.shape[1] - int(_spectrum(mixing)[2].sum())) ** 0.5


def best_scalar(mixing: Float[Tensor, "n_p n"], weights: Weights | None = None) -> float:
    """The factor c ≥ 0 for which cΓ minimises ‖c²G − I‖_F, G = W_pᵀΓ²W_p: c² = tr G/‖G‖_F².

    Without weights the best multiple of I. 0 where G = 0.
    """
    gram = _gram(mixing, weights)
    square = float(gram.square().sum())
    return float(gram.trace() / square) ** 0.5 if square > 0 else 0.0


def best_scaled_gap_norm(mixing: Float[Tensor, "n_p n"], weights: Weights | None = None) -> float:
    """‖c²G − I‖_F at the best scale of the weights (``best_scalar``): √(n − (tr G)²/‖G‖_F²).

    A loss has the same minimum at any scale of its weights, so this compares weights.
    """
    scale = best_scalar(mixing, weights)
    gram = _gram(mixing, weights)
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
        bound=least_gap_norm(mixing),
    )


def _gram(mixing: Tensor, weights: Weights | None) -> Tensor:
    seen = weighted(mixing.double().T, None if weights is None else weights.double())
    return seen @ seen.T


def _spectrum(mixing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and eigenvectors of W_p W_pᵀ (float64), and which of them are not 0."""
    values, vectors = torch.linalg.eigh(mixing.double() @ mixing.double().T)
    if not float(values[-1]) > 0:
        raise UsageError("W_p is 0: it mixes no feature into any dimension")
    return values, vectors, values > _RANK_TOLERANCE * values[-1]
