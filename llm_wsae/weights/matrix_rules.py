"""Rules with a matrix: each gives a symmetric positive S [d_in, d_in], and Γ = S^α.

A diagonal Γ can only stretch the axes that the model happens to have; a matrix can stretch any
direction. The control ``rotated`` stretches random directions by the same factors.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import LlmWsaeError
from llm_wsae.weights.inputs import RuleInputs

EIGENVALUE_FLOOR = 1e-3
"""Smallest eigenvalue of S, in medians of the positive ones: Γ stays invertible, and a negative
power does not amplify the noise of the estimate. (A language model's Fisher information, whose
smallest eigenvalue is a fifth of the median, never reaches it.)"""


def sensitivity(inputs: RuleInputs) -> Float[Tensor, "d_in d_in"]:
    """S = F, the Fisher information of the model's next-token distribution at the site.

    With α = ½, ½‖Γδ‖² is the KL divergence that a small change δ of the activation causes (second
    order, Amari 1998); a smaller power goes part of the way.
    """
    assert inputs.fisher is not None  # ``Rule`` has checked
    return inputs.fisher.double()


def whitening(inputs: RuleInputs) -> Float[Tensor, "d_in d_in"]:
    """S = Σ^{−½}, Σ the covariance of the usual rows: ZCA whitening (Bell & Sejnowski 1997).

    Γ = Σ^{−α/2} leaves covariance Σ^{1−α}: α = 1 whitens fully, ½ halfway. At α = 1 it is, up to
    its scale, the Γ that minimises ‖WᵀΓ²W − I‖ for independent features x, x_p = Wx, of equal
    variance: the optimum of theorem 5 (Cui et al. 2026) over all Γ
    (``theory.optimum.least_gap_weights``). The floor applies to the eigenvalues of Σ.
    """
    values, vectors = spectrum(inputs.covariance)
    return (vectors * values.rsqrt()) @ vectors.T


def rotated(matrix: Float[Tensor, "d_in d_in"], draw: int) -> Float[Tensor, "d_in d_in"]:
    """The same spectrum with random eigenvectors, drawn with that seed."""
    rotation = random_rotation(len(matrix), draw)
    return (rotation * spectrum(matrix)[0]) @ rotation.T


def random_rotation(size: int, draw: int) -> Float[Tensor, "size size"]:
    """Uniform over rotations and reflections, drawn with that seed (float64)."""
    generator = torch.Generator().manual_seed(draw)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()  # else QR's convention makes the rotation not uniform


def spectrum(
    matrix: Float[Tensor, "d_in d_in"],
) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "d_in d_in"]]:
    """Eigenvalues in rising order, none below the floor, and eigenvectors as columns (float64).

    Raises LlmWsaeError if the matrix is not finite or has no positive eigenvalue.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise LlmWsaeError("a matrix of weights holds NaN or infinite numbers; measure again")
    values, vectors = torch.linalg.eigh(matrix.double())
    positive = values[values > values[-1] * 1e-12]
    if not float(values[-1]) > 0:
        raise LlmWsaeError(
            "a matrix of weights has no positive eigenvalue, so it prefers nothing; take another "
            "rule"
        )
    return values.clamp(min=EIGENVALUE_FLOOR * float(positive.median())), vectors
