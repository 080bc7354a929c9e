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


def kurtosis(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = E(x_i − μ_i)⁴ / Var(x_i)² of the usual rows: rarely active means heavy tails."""
    return scores.kurtosis(inputs.statistics.usual_sample)


def participation(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = 1 / number of latents of a first dictionary that share the dimension.

    Proposed here: the participation ratio (Bell and Dean 1970) of q_ij = E z_j²·W_ji² over the
    latents j, so a latent counts by how often and how strongly it fires.
    """
    return scores.participation(_measured(inputs.decoder), inputs.energy)


def sensitivity(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = F_ii: how much the model's next-token distribution depends on the dimension.

    Fisher information (Amari 1998); with α = ½ the loss is the diagonal approximation of the KL
    divergence that the reconstruction causes, to second order.
    """
    return _measured(inputs.fisher).diagonal().clone()


def _measured(value: Tensor | None) -> Tensor:
    """``Rule`` has checked that the measurement is there."""
    assert value is not None
    return value
