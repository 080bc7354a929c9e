"""Stand-ins for the language model and the text, for the rules that need them.

Planted data has neither, but it has what they stand for: a row's true features are what its text is
about, and the model that superposition is a toy of (Elhage et al. 2022) reads those features.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from llm_wsae.statistics.coherence import STRANGERS, beyond_chance
from llm_wsae.theory.superposition import Planted
from llm_wsae.weights.config import RuleInputConfig

_OFF = 1e-4  # a feature read as less is off; in a rotated basis, rounding alone gives about 1e-7


def fisher(data: Planted, observed: Float[Tensor, "rows n_p"]) -> Float[Tensor, "n_p n_p"]:
    """Fisher information, at the observed rows, of a model that outputs the true features.

    It reads x̂_j = ReLU(w_jᵀx_p / ‖w_j‖²), w_j the columns of W_p, which is exact where one feature
    is active; for unit columns it is the toy model's own output. Under Gaussian noise of variance
    1 the information is E JᵀJ, J = ∂x̂/∂x_p. Float64.
    """
    w = data.mixing.double()
    read = w / w.square().sum(0)
    read_at_all = (observed.double() @ read > _OFF).double().mean(0)
    return (read * read_at_all) @ read.T


def coherence(
    data: Planted, x: Float[Tensor, "rows n"], generator: torch.Generator
) -> Float[Tensor, " n_p"]:
    """How similar the rows are that lie furthest from the mean in a dimension: cosine of their true
    features, which a perfect encoder would read from their texts. Float64."""
    observed = data.observe(x)
    extreme = (observed - observed.mean(0)).abs().topk(RuleInputConfig.top, dim=0).indices.T
    meaning = normalize(x.double(), dim=1)
    strangers = torch.randperm(len(x), generator=generator)[:STRANGERS]
    return beyond_chance(meaning[extreme], meaning[strangers], strangers, generator)
