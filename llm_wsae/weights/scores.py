"""How monosemantic is a dimension? The formulae, as pure functions.

Those of samples need only a site's rows; ``participation`` and ``gap`` need the directions of the
features, or a dictionary as an estimate of them. The same functions serve real activations and
planted data, where they can be compared with the truth. All scores are ≥ 0 and larger for a
dimension that looks more monosemantic; a constant dimension scores 0.

Massive rows distort the moments: pass rows without them (``Statistics.usual_sample``).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def kurtosis(samples: Float[Tensor, "rows d_in"]) -> Float[Tensor, " d_in"]:
    """s_i = E(x_i − μ_i)⁴ / Var(x_i)²: 3 for a Gaussian, large for something rarely active.

    Not the excess (minus 3), which is negative for flat distributions and could not be a weight;
    the order of the dimensions is the same. Float64. (Sparse coding, e.g. Olshausen & Field 1996.)
    """
    centred = samples.double() - samples.double().mean(0)
    square = centred.square()
    return _ratio(square.square().mean(0), square.mean(0).square())


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


def random_order(d_in: int, seed: int) -> Int[Tensor, " d_in"]:
    """An order of the dimensions: the control with a rule's spread but not its choice of
    dimensions."""
    return torch.randperm(d_in, generator=torch.Generator().manual_seed(seed))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    safe = denominator.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(denominator > 0, numerator / safe, 0.0)
