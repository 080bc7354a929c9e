"""How much of the planted features a dictionary recovers.

The measures need the true features, so they exist on planted data only. ``l_gt`` is the theory's
own; the others say in which way a dictionary is good or bad.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.theory.entanglement import absorbed, correlations, merged
from llm_wsae.theory.superposition import Relations

FOUND_COSINE = 0.9
_ALTERNATIONS, _CONVERGED = 50, 1e-12


@dataclass(frozen=True)
class Recovery:
    """One dictionary compared with the truth."""

    l_gt: float
    """min over matchings and scales of E‖x − c∘z_match‖² / E‖x‖²: share of the true features'
    energy that is missing when every feature is matched to its own latent, at its best scale c."""
    l_gt_one_scale: float
    """The same with one scale for all features (``matched_losses``): latents of the wrong relative
    strength count against the dictionary."""
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
    absorbed: float | None = None
    """How much more often a parent's latent is silent when a child is active (``absorbed``); None
    where no feature has a parent."""
    merged: float | None = None
    """Share of related features whose latent is also a relative's (``merged``); None where no
    features are related."""


def measure(
    decoder: Float[Tensor, "latents n_p"],
    codes: Float[Tensor, "rows latents"],
    mixing: Float[Tensor, "n_p n"],
    x: Float[Tensor, "rows n"],
    relations: Relations | None = None,
) -> Recovery:
    """Compare codes and decoder (both in the observed space, without bias) with the truth."""
    observed = x @ mixing.T
    largest = _cosines(decoder, mixing).amax(0)
    missed = (observed - codes @ decoder).square().sum()
    l_gt, one_scale = matched_losses(codes, x)
    parent = None if relations is None else relations.parent
    return Recovery(
        l_gt=l_gt,
        l_gt_one_scale=one_scale,
        mmcs=float(largest.mean()),
        recovered=float((largest > FOUND_COSINE).float().mean()),
        features_per_latent=features_per_latent(codes, x),
        fvu=float(missed / (observed - observed.mean(0)).square().sum()),
        absorbed=None if parent is None else absorbed(codes, x, parent),
        merged=None if relations is None else merged(codes, x, relations.group),
    )


def matched_losses(
    codes: Float[Tensor, "rows latents"], x: Float[Tensor, "rows n"]
) -> tuple[float, float]:
    """L_GT with each feature matched to at most one latent: with a scale for each pair, and with
    one scale for all.

    The best scale of a pair is ⟨x_j, z_l⟩/‖z_l‖², which removes ⟨x_j, z_l⟩²/‖z_l‖² of ‖x_j‖²; the
    matching that removes most is an assignment problem (Kuhn 1955, "Hungarian"). A feature without
    a latent is missed entirely.

    With one scale c a pair removes 2c⟨x_j, z_l⟩ − c²‖z_l‖², or nothing if it is left unmatched. The
    best matching of a c and the best c of a matching, Σ⟨x_j, z_l⟩/Σ‖z_l‖² over its pairs, are found
    in turn, from the first matching on, until neither changes: an upper bound of the least.
    """
    from scipy.optimize import linear_sum_assignment

    power = codes.double().square().sum(0)
    product = x.double().T @ codes.double()
    total = float(x.double().square().sum())
    removed = product.square() / torch.where(power > 0, power, 1.0)
    rows, columns = linear_sum_assignment(removed.numpy(), maximize=True)
    fitted = float(removed[rows, columns].sum())
    single = 0.0
    for _ in range(_ALTERNATIONS):
        energy = float(power[columns].sum())
        if energy == 0:
            break
        scale = float(product[rows, columns].sum()) / energy
        before, single = single, scale**2 * energy
        if single <= before * (1 + _CONVERGED):
            break
        removed = (2 * scale * product - scale**2 * power).clamp(min=0)
        rows, columns = linear_sum_assignment(removed.numpy(), maximize=True)
        used = removed[rows, columns].numpy() > 0
        rows, columns = rows[used], columns[used]
    return 1 - fitted / total, 1 - single / total


def features_per_latent(codes: Float[Tensor, "rows latents"], x: Float[Tensor, "rows n"]) -> float:
    """Mean participation ratio (Σ_j ρ²)²/Σ_j ρ⁴ of a latent's correlations ρ with the features,
    each latent weighted by its variance; NaN if all are constant.

    Weighted by variance, because a spare latent that fires on a few rows correlates with features
    by chance: it would look like a mixture of all of them, and there are many such latents.
    """
    spread = (codes - codes.mean(0)).norm(dim=0)
    alive = spread > 0
    if not bool(alive.any()):
        return float("nan")
    rho = correlations(codes, x)[alive].double().square()
    ratio = rho.sum(1).square() / rho.square().sum(1)
    share = spread[alive].double().square()
    return float((ratio * share).sum() / share.sum())


def _cosines(decoder: Tensor, mixing: Tensor) -> Tensor:
    """[latents, n]; 0 for a decoder row or a feature of length 0."""
    rows = decoder / decoder.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return rows @ (mixing / mixing.norm(dim=0).clamp(min=1e-12))
