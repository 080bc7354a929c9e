"""How monosemantic is a dimension? The formulae, as pure functions.

Those of samples need only a site's rows; ``participation`` and ``gap`` need the directions of the
features, or a dictionary as an estimate of them. The same functions serve real activations and
planted data, where they can be compared with the truth. All scores are ≥ 0 and larger for a
dimension that looks more monosemantic; a constant dimension scores 0.

Massive rows distort the moments: pass rows without them (``Statistics.usual_sample``).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Hyvärinen's constants for the non-quadratic functions u·exp(−u²/2) and exp(−u²/2).
_K_ODD = 36 / (8 * math.sqrt(3) - 9)
_K_EVEN = 24 / (16 * math.sqrt(3) - 27)
_NEAREST = 1e-2  # of the mean of normalised rows
_GAUSSIAN_EVEN = math.sqrt(0.5)  # E exp(−ν²/2), ν standard normal


def token_norm(rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, " rows"]:
    """s_t = mean over dimensions of x_ti², of centred rows: how far a token is from the mean.

    A score of rows, not of dimensions, so it weighs tokens. At least ``_NEAREST``, or a row at the
    mean would get all the weight under a negative power.
    """
    return rows.square().mean(1).clamp(min=_NEAREST)


def kurtosis(samples: Float[Tensor, "rows d_in"]) -> Float[Tensor, " d_in"]:
    """s_i = E(x_i − μ_i)⁴ / Var(x_i)²: 3 for a Gaussian, large for something rarely active.

    Not the excess (minus 3), which is negative for flat distributions and could not be a weight;
    the order of the dimensions is the same. Float64. (Sparse coding, e.g. Olshausen & Field 1996.)
    """
    centred = samples.double() - samples.double().mean(0)
    square = centred.square()
    return _ratio(square.square().mean(0), square.mean(0).square())


def hoyer(samples: Float[Tensor, "rows d_in"]) -> Float[Tensor, " d_in"]:
    """s_i = (√N − ‖x_i‖₁/‖x_i‖₂) / (√N − 1) over N rows of x_i minus its median: 1 for a single
    row that differs from the median, 0 for |x_i| that never changes.

    Hoyer 2004, "Non-negative matrix factorization with sparseness constraints", §3.1. The median is
    subtracted because the dimensions of a residual stream do not rest at 0.
    Float64.
    """
    centred = samples.double() - samples.double().median(dim=0).values
    root = math.sqrt(len(samples))
    ratio = _ratio(centred.abs().sum(0), centred.norm(dim=0))
    score = (root - ratio) / max(root - 1, 1e-12)
    return torch.where(ratio > 0, score.clamp(min=0), 0.0)


def negentropy(samples: Float[Tensor, "rows d_in"]) -> Float[Tensor, " d_in"]:
    """s_i = k₁(E u·e^{−u²/2})² + k₂(E e^{−u²/2} − √½)² of the standardised u: distance from a
    Gaussian in nats, approximately; robust where kurtosis depends on the tail.

    Hyvärinen 1998, "New approximations of differential entropy", eq. 14 (their G₁ᵃ and G₂ᵇ).
    Float64.
    """
    centred = samples.double() - samples.double().mean(0)
    u = _ratio(centred, centred.square().mean(0).sqrt().expand_as(centred))
    bell = (-u.square() / 2).exp()
    odd = (u * bell).mean(0)
    even = bell.mean(0) - _GAUSSIAN_EVEN
    score = _K_ODD * odd.square() + _K_EVEN * even.square()
    return torch.where(centred.abs().amax(0) > 0, score, 0.0)


def participation(
    decoder: Float[Tensor, "latents d_in"], energy: Float[Tensor, " latents"] | None = None
) -> Float[Tensor, " d_in"]:
    """s_i = 1/PR_i = Σ_j q_ij² / (Σ_j q_ij)², q_ij = energy_j · W_ji²: one over the number of
    latents that share dimension i, 1 if a single latent has it for itself.

    ``energy`` weights every latent by how much it is used, E z_j² (its frequency times its mean
    square when active); by default all count alike. With the true W_pᵀ as the decoder this is
    the true monosemanticity. Float64.
    """
    q = decoder.double().square()
    if energy is not None:
        q = q * energy.double()[:, None]
    return _ratio(q.square().sum(0), q.sum(0).square())


def gap(decoder: Float[Tensor, "latents d_in"]) -> Float[Tensor, " d_in"]:
    """The γ ≥ 0 that minimise ‖W_pᵀ Γ² W_p − I‖_F, with the decoder's rows as the columns of W_p.

    By theorem 5 of Cui et al. 2026 that matrix is the gap between the weighted loss and the loss on
    the true features. In g = γ² this is a non-negative least squares of d_in unknowns: with
    rows w_i of W_p, ‖Σ g_i w_i w_iᵀ − I‖² = gᵀMg − 2bᵀg + n, M = (W_p W_pᵀ)∘(W_p W_pᵀ),
    b_i = ‖w_i‖², so the cost does not depend on the number of latents. A
    dimension may get exactly 0. Float64.
    """
    from scipy.optimize import nnls  # imported here: it is slow to import

    w = decoder.double()
    gram = (w.T @ w).square()
    # b is in the range of the Gram matrix M = AᵀA, so ‖Ag − c‖ with Aᵀc = b is the same problem.
    values, vectors = torch.linalg.eigh(gram)
    keep = values > values[-1] * 1e-12
    if not bool(keep.any()):  # of a decoder of which no latent fires
        return torch.zeros(len(gram), dtype=torch.float64, device=decoder.device)
    root = values[keep].sqrt()
    a = root[:, None] * vectors[:, keep].T
    c = (vectors[:, keep].T @ w.square().sum(0)) / root
    solution, _ = nnls(a.cpu().numpy(), c.cpu().numpy(), maxiter=30 * len(gram))
    return torch.from_numpy(solution).sqrt().to(decoder.device)


def random_scores(d_in: int, seed: int) -> Float[Tensor, " d_in"]:
    """s_i uniform on (0, 1]: the control that knows nothing of the dimensions (float64)."""
    generator = torch.Generator().manual_seed(seed)
    return 1 - torch.rand(d_in, generator=generator, dtype=torch.float64)


def random_order(d_in: int, seed: int) -> Int[Tensor, " d_in"]:
    """An order of the dimensions: the control with a rule's spread but not its choice of
    dimensions."""
    return torch.randperm(d_in, generator=torch.Generator().manual_seed(seed))


def order_within_deciles(variance: Float[Tensor, " d_in"], seed: int) -> Int[Tensor, " d_in"]:
    """The same, but only dimensions of one tenth of all by variance change places: the loss then
    rests on about as many effective dimensions as the rule's."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(len(variance), dtype=torch.int64)
    for decile in variance.argsort(stable=True).tensor_split(10):
        order[decile] = decile[torch.randperm(len(decile), generator=generator)]
    return order


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    safe = denominator.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(denominator > 0, numerator / safe, 0.0)
