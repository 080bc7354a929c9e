"""Rules with one score per dimension: each reads what was measured of a site, and calls a formula.

The formulae are in ``scores.py``. All scores are float64 and ≥ 0, larger for a dimension that looks
more monosemantic.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.weights import scores
from llm_wsae.weights.inputs import RuleInputs


def uniform(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s = 1: the plain sparse autoencoder, to which every other rule is compared."""
    return torch.ones(inputs.statistics.d_in, dtype=torch.float64)


def variance(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = Var(x_i) over all rows: the proxy of Cui et al. 2026 (arXiv 2506.15963, §5)."""
    return inputs.statistics.variance


def robust_variance(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = Var(x_i) winsorised (Tukey 1962) at ½ % on each side, without massive rows: the paper's
    proxy, made robust to massive activations."""
    return inputs.statistics.robust_variance


def kurtosis(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = E(x_i − μ_i)⁴ / Var(x_i)² of the usual rows: rarely active means heavy tails."""
    return scores.kurtosis(inputs.statistics.usual_sample)


def hoyer(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = sparsity of the usual rows (Hoyer 2004, JMLR 5), in [0, 1]: 1 for one active row."""
    return scores.hoyer(inputs.statistics.usual_sample)


def negentropy(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = distance from a Gaussian (Hyvärinen 1998, eq. 14): near 0 for mixtures of many
    features."""
    return scores.negentropy(inputs.statistics.usual_sample)


def participation(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = 1 / number of latents of a first dictionary that share the dimension.

    Proposed here: the participation ratio (Bell and Dean 1970) of q_ij = E z_j²·W_ji² over the
    latents j, so a latent counts by how often and how strongly it fires.
    """
    return scores.participation(_measured(inputs.decoder), inputs.energy)


def gap(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s = the γ ≥ 0 that minimise ‖W_pᵀΓ²W_p − I‖_F, with a first dictionary's decoder as W_pᵀ.

    Theorem 5 of Cui et al. 2026: that matrix is the gap between the loss and the one on the true
    features. With α = 1 these are the weights γ; a dimension whose γ is 0 leaves the loss.
    """
    return scores.gap(_measured(inputs.decoder))


def sensitivity(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = F_ii: how much the model's next-token distribution depends on the dimension.

    Fisher information (Amari 1998); with α = ½ the loss is the diagonal approximation of the KL
    divergence that the reconstruction causes, to second order.
    """
    return _measured(inputs.fisher).diagonal().clone()


def semantic(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = mean cosine of the texts that move the dimension most, beyond that of random texts.

    The paper's measure for vision (Cui et al. 2026, §5), with a sentence encoder for text.
    """
    return _measured(inputs.coherence)


def random(inputs: RuleInputs, draw: int) -> Float[Tensor, " d_in"]:
    """s_i uniform on (0, 1]: a control that knows nothing of the dimensions."""
    return scores.random_scores(inputs.statistics.d_in, draw)


def _measured(value: Tensor | None) -> Tensor:
    """``Rule`` has checked that the measurement is there."""
    assert value is not None
    return value
