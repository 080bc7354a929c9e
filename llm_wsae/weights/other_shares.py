"""The control ``shares``: a rule's shares of the loss, given to other dimensions or directions.

Permuted or rotated weights usually leave the loss with fewer effective dimensions than the rule
does, so they cannot tell whether the rule gains by its directions or by that number alone. These
weights keep the number: the variances of the weighted rows are the rule's, in random directions.
Where all shares are equal, as under full whitening, every such control is the rule itself.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.loss_weights import Gamma
from llm_wsae.weights.matrix_rules import random_rotation, spectrum
from llm_wsae.weights.scores import random_order


def exchanged(gamma: Gamma, inputs: RuleInputs, draw: int, of_all_rows: bool) -> Gamma:
    """Weights whose shares of the loss are those of ``gamma`` elsewhere, by the seed ``draw``.

    γ [d_in]: γ′² = (γ²·var of another dimension) / var; a constant dimension keeps its weight.
    Γ [d_in, d_in], symmetric: Γ′² = Σ^(−½) Q S Qᵀ Σ^(−½) for S, the eigenvalues of Σ^(½) Γ² Σ^(½),
    and a random rotation Q, so that Γ′ΣΓ′ has the eigenvalues of ΓΣΓ. Σ is the covariance of all
    rows, ``of_all_rows``, for a rule that is made from it, else that of the winsorised sample; its
    eigenvalues are floored as a matrix rule's are. (Effective dimensions are reported from the
    sample, so with the covariance of all rows they agree up to sampling noise.)
    """
    if gamma.ndim == 2:
        sample = inputs.statistics.robust_covariance
        return _of_directions(gamma, inputs.covariance if of_all_rows else sample, draw)
    variance = inputs.statistics.robust_variance
    varies = variance.nonzero().squeeze(1)
    others = varies[random_order(len(varies), draw)]
    found = gamma.clone()
    found[varies] = gamma[others] * (variance[others] / variance[varies]).sqrt()
    return found


def _of_directions(
    gamma: Float[Tensor, "d_in d_in"], covariance: Float[Tensor, "d_in d_in"], draw: int
) -> Float[Tensor, "d_in d_in"]:
    values, vectors = spectrum(covariance)
    root = (vectors * values.sqrt()) @ vectors.T
    inverse_root = (vectors * values.rsqrt()) @ vectors.T
    weighted = root @ gamma
    shares = torch.linalg.svdvals(weighted).square()  # of ΓΣΓ
    rotation = random_rotation(len(gamma), draw)
    squared = inverse_root @ (rotation * shares) @ rotation.T @ inverse_root
    values, vectors = torch.linalg.eigh(squared)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
