"""How much of the true features a dictionary finds, where they are known."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

FOUND_COSINE = 0.9


@dataclass(frozen=True)
class Recovery:
    """One dictionary compared with the truth."""

    recovered: float
    """Share of true features with a decoder row at a cosine above 0.9."""
    mmcs: float
    """Mean over true features of the largest cosine between its direction and a decoder row
    (Sharkey et al. 2022); the sign counts, since latents are not negative."""
    l_gt: float
    """min over matchings and scales of E‖x − c∘z_match‖² / E‖x‖²: share of the true features'
    energy that is missing when every feature is matched to its own latent, at its best scale c."""
    features_per_latent: float
    """Mean over latents, each by its variance, of the participation ratio of its squared
    correlations with the true features: 1 is a monosemantic latent."""


def measure(
    decoder: Float[Tensor, "latents n_p"],
    codes: Float[Tensor, "rows latents"],
    mixing: Float[Tensor, "n_p n"],
    x: Float[Tensor, "rows n"],
) -> Recovery:
    """Compare a dictionary's decoder, and its codes of W_p x, with W_p and x."""
    largest = _cosines(decoder, mixing).amax(0)
    return Recovery(
        recovered=float((largest > FOUND_COSINE).float().mean()),
        mmcs=float(largest.mean()),
        l_gt=matched_loss(codes, x),
        features_per_latent=features_per_latent(codes, x),
    )


def matched_loss(codes: Float[Tensor, "rows latents"], x: Float[Tensor, "rows n"]) -> float:
    """L_GT with each feature matched to at most one latent, at the best scale of each pair.

    That scale is ⟨x_j, z_l⟩/‖z_l‖², which removes ⟨x_j, z_l⟩²/‖z_l‖² of ‖x_j‖²; the matching that
    removes most is an assignment problem (Kuhn 1955, "Hungarian"). A feature without a latent is
    missed entirely.
    """
    from scipy.optimize import linear_sum_assignment

    power = codes.double().square().sum(0)
    product = x.double().T @ codes.double()
    removed = product.square() / torch.where(power > 0, power, 1.0)
    rows, columns = linear_sum_assignment(removed.numpy(), maximize=True)
    return 1 - float(removed[rows, columns].sum() / x.double().square().sum())


def features_per_latent(codes: Float[Tensor, "rows latents"], x: Float[Tensor, "rows n"]) -> float:
    """Mean participation ratio (Σ_j ρ²)²/Σ_j ρ⁴ of a latent's correlations ρ with the features,
    each latent weighted by its variance; NaN if all are constant.

    Weighted by variance, because a spare latent that fires on a few rows correlates with features
    by chance: it would look like a mixture of all of them, and there are many such latents.
    """
    z, features = (codes - codes.mean(0)).double(), (x - x.mean(0)).double()
    spread = z.norm(dim=0)
    alive = spread > 0
    if not bool(alive.any()):
        return float("nan")
    rho = (_unit(z[:, alive]).T @ _unit(features)).square()
    ratio = rho.sum(1).square() / rho.square().sum(1)
    share = spread[alive].square()
    return float((ratio * share).sum() / share.sum())


def _cosines(decoder: Tensor, mixing: Tensor) -> Tensor:
    """[latents, n]; 0 for a decoder row or a feature of length 0."""
    return _unit(decoder.T).T @ _unit(mixing)


def _unit(columns: Tensor) -> Tensor:
    return columns / columns.norm(dim=0).clamp(min=1e-12)
