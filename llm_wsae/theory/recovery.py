"""How much of the planted features a dictionary recovers.

The measures need the true features, so they exist on planted data only. ``l_gt`` is the theory's
own; the others say in which way a dictionary is good or bad.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

FOUND_COSINE = 0.9


@dataclass(frozen=True)
class Recovery:
    """One dictionary compared with the truth."""

    l_gt: float
    """min over matchings and scales of E‖x − c∘z_match‖² / E‖x‖²: share of the true features'
    energy that is missing when every feature is matched to its own latent, at its best scale c."""
    mmcs: float
    """Mean over true features of the largest cosine between its direction and a decoder row
    (Sharkey et al. 2022); the sign counts, since latents are not negative."""
    recovered: float
    """Share of true features for which that cosine exceeds 0.9."""
    features_per_latent: float
    """Mean over latents, each by its variance, of the participation ratio of its squared
    correlations with the true features: 1 is a monosemantic latent."""
    fvu: float
    """Fraction of the observed rows' variance, unweighted, that the reconstruction misses."""


def measure(
    decoder: Float[Tensor, "latents n_p"],
    codes: Float[Tensor, "rows latents"],
    mixing: Float[Tensor, "n_p n"],
    x: Float[Tensor, "rows n"],
) -> Recovery:
    """Compare codes and decoder (both in the observed space, without bias) with the truth."""
    observed = x @ mixing.T
    largest = _cosines(decoder, mixing).amax(0)
    missed = (observed - codes @ decoder).square().sum()
    return Recovery(
        l_gt=matched_loss(codes, x),
        mmcs=float(largest.mean()),
        recovered=float((largest > FOUND_COSINE).float().mean()),
        features_per_latent=features_per_latent(codes, x),
        fvu=float(missed / (observed - observed.mean(0)).square().sum()),
    )


def matched_loss(codes: Float[Tensor, "rows latents"], x: Float[Tensor, "rows n"]) -> float:
    """L_GT: each feature matched to at most one latent, each latent scaled to fit its feature.

    The best scale of a pair is ⟨x_j, z_l⟩/‖z_l‖², which removes ⟨x_j, z_l⟩²/‖z_l‖² of ‖x_j‖²; the
    matching that removes most is an assignment problem (Kuhn 1955, "Hungarian"). A feature without
    a latent is missed entirely.
    """
    from scipy.optimize import linear_sum_assignment

    power = codes.double().square().sum(0)
    product = x.double().T @ codes.double()
    removed = product.square() / torch.where(power > 0, power, 1.0)
    rows, columns = linear_sum_assignment(removed.numpy(), maximize=True)
    total = x.double().square().sum()
    return float(1 - removed[rows, columns].sum() / total)


def features_per_latent(codes: Float[Tensor, "rows latents"], x: Float[Tensor, "rows n"]) -> float:
    """Mean participation ratio (Σ_j ρ²)²/Σ_j ρ⁴ of a latent's correlations ρ with the features,
    each latent weighted by its variance; NaN if all are constant.

    Weighted by variance, because a spare latent that fires on a few rows correlates with features
    by chance: it would look like a mixture of all of them, and there are many such latents.
    """
    z = codes - codes.mean(0)
    centred = x - x.mean(0)
    spread = z.norm(dim=0)
    alive = spread > 0
    if not bool(alive.any()):
        return float("nan")
    # A feature that is constant correlates with nothing.
    length = centred.norm(dim=0).clamp(min=1e-12)
    rho = (z[:, alive].T @ centred / (spread[alive, None] * length)).double().square()
    ratio = rho.sum(1).square() / rho.square().sum(1)
    share = spread[alive].double().square()
    return float((ratio * share).sum() / share.sum())


def _cosines(decoder: Tensor, mixing: Tensor) -> Tensor:
    """[latents, n]; 0 for a decoder row or a feature of length 0."""
    rows = decoder / decoder.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return rows @ (mixing / mixing.norm(dim=0).clamp(min=1e-12))
