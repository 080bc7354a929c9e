"""What weight rules compute. Each estimates from what was measured of a site how monosemantic each
dimension is: scores s, which become loss weights γ = s^α, or a symmetric positive matrix S, and
Γ = S^α. A diagonal Γ can only stretch the axes that the model happens to have, a matrix any
direction. A new rule is a function here and a line in ``rules.RULES``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import LlmWsaeError
from llm_wsae.statistics.moments import SecondMoment, Statistics, ratio, shrunk

EIGENVALUE_FLOOR = 1e-3
"""Smallest eigenvalue of S, in medians of the positive ones: Γ stays invertible, and a negative
power does not amplify the noise of the estimate. (A language model's Fisher information, whose
smallest eigenvalue is a fifth of the median, never reaches it.)"""


@dataclass(frozen=True)
class RuleInputs:
    """What was measured of a site's dimensions: the statistics, always, and what ``measure_inputs``
    adds for the rules that need it."""

    statistics: Statistics
    decoder: Float[Tensor, "latents d_in"] | None = None
    """Decoder rows of a first dictionary, only of the latents that fire."""
    energy: Float[Tensor, " latents"] | None = None
    """E z² of each of those latents: its frequency times its mean square."""
    fisher: Float[Tensor, "d_in d_in"] | None = None
    """Fisher information of the model's next-token distribution at the site."""
    second_moment: SecondMoment | None = None
    """Sums over all rows, behind ``covariance``."""

    @property
    def covariance(self) -> Float[Tensor, "d_in d_in"]:
        """The covariance of all usual rows, shrunk where they are few (``shrunk``), float64. Raises
        LlmWsaeError if there are fewer rows than dimensions."""
        assert self.second_moment is not None
        check_rows_of_covariance(self.second_moment.count, self.statistics.d_in)
        return shrunk(self.second_moment.covariance(), self.second_moment.count)

    @classmethod
    def of(cls, measured: "RuleInputs | Statistics") -> "RuleInputs":
        """The inputs themselves, or those with nothing but the statistics."""
        return measured if isinstance(measured, RuleInputs) else cls(measured)


def check_rows_of_covariance(rows: int, d_in: int) -> None:
    """Raise LlmWsaeError if there are too few rows to measure a covariance of."""
    if rows <= d_in:
        raise LlmWsaeError(
            f"{rows:,} rows are too few for the covariance of {d_in:,} dimensions; take at "
            f"least {10 * d_in:,}: harvest as many tokens, or raise --statistics-tokens of a stream"
        )


def uniform(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s = 1: the plain sparse autoencoder, to which every other rule is compared."""
    return torch.ones(inputs.statistics.d_in, dtype=torch.float64)


def variance(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = Var(x_i) over all rows: the proxy of Cui et al. 2026 (arXiv 2506.15963, §5)."""
    return inputs.statistics.variance


def kurtosis(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = E(x_i − μ_i)⁴ / Var(x_i)² of the usual rows: 3 for a Gaussian, large for something
    rarely active (sparse coding, e.g. Olshausen & Field 1996), 0 for a constant dimension."""
    rows = inputs.statistics.usual_sample.double()
    square = (rows - rows.mean(0)).square()
    return ratio(square.square().mean(0), square.mean(0).square())


def participation(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = 1/PR_i = Σ_j q_ij² / (Σ_j q_ij)², q_ij = E z_j²·W_ji²: one over the number of latents
    of a first dictionary that share dimension i, each counted by how often and how strongly it
    fires. Proposed here, after the participation ratio of Bell and Dean 1970."""
    assert inputs.decoder is not None and inputs.energy is not None
    q = inputs.decoder.double().square() * inputs.energy.double()[:, None]
    return ratio(q.square().sum(0), q.sum(0).square())


def sensitivity(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = F_ii, the diagonal of ``sensitivity_matrix``."""
    return sensitivity_matrix(inputs).diagonal().clone()


def sensitivity_matrix(inputs: RuleInputs) -> Float[Tensor, "d_in d_in"]:
    """S = F, the Fisher information of the model's next-token distribution (Amari 1998): with
    α = ½, ½‖Γδ‖² is the KL divergence that a small change δ of the activation causes, to second
    order."""
    assert inputs.fisher is not None
    return inputs.fisher.double()


def whitening(inputs: RuleInputs) -> Float[Tensor, "d_in d_in"]:
    """S = Σ^{−½}, Σ the covariance of the usual rows, eigenvalues from the floor: ZCA whitening
    (Bell & Sejnowski 1997). Γ = Σ^{−α/2} leaves covariance Σ^{1−α}: α = 1 whitens fully, ½ halfway.
    At 1 it is, up to its scale, the Γ that minimises ‖WᵀΓ²W − I‖ for independent features x,
    x_p = Wx, of equal variance: the optimum of theorem 5 (Cui et al. 2026) over all Γ
    (``llm_wsae.least_gap_weights``)."""
    values, vectors = spectrum(inputs.covariance)
    return (vectors * values.rsqrt()) @ vectors.T


def permuted(found: Tensor, draw: int) -> Tensor:
    """The scores of other dimensions; of a matrix, the same values and directions on other axes."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(draw))
    return found[order] if found.ndim == 1 else found[order][:, order]


def rotated(matrix: Float[Tensor, "d_in d_in"], draw: int) -> Float[Tensor, "d_in d_in"]:
    """The same spectrum with random eigenvectors, uniform over rotations and reflections."""
    generator, size = torch.Generator().manual_seed(draw), len(matrix)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    rotation = q * r.diagonal().sign()  # else QR's convention makes the rotation not uniform
    return (rotation * spectrum(matrix)[0]) @ rotation.T


def spectrum(matrix: Tensor) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "d_in d_in"]]:
    """Eigenvalues in rising order, none below the floor, and eigenvectors as columns (float64).
    Raises LlmWsaeError if the matrix is not finite or has no positive eigenvalue."""
    if not bool(torch.isfinite(matrix).all()):
        raise LlmWsaeError("a matrix of weights holds NaN or infinite numbers; measure again")
    values, vectors = torch.linalg.eigh(matrix.double())
    if not float(values[-1]) > 0:
        raise LlmWsaeError(
            "a matrix of weights has no positive eigenvalue, so it prefers nothing; take another "
            "rule"
        )
    positive = values[values > values[-1] * 1e-12]
    return values.clamp(min=EIGENVALUE_FLOOR * float(positive.median())), vectors
