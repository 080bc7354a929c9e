"""How monosemantic is a dimension? The formulae, as pure functions.

Those of samples need only a site's rows; ``participation`` needs the directions of the features,
or a dictionary as an estimate of them. The same functions serve real activations and
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


def random_order(d_in: int, seed: int) -> Int[Tensor, " d_in"]:
    """An order of the dimensions: the control with a rule's spread but not its choice of
    dimensions."""
    return torch.randperm(d_in, generator=torch.Generator().manual_seed(seed))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    safe = denominator.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(denominator > 0, numerator / safe, 0.0)
