"""What the weighted classes add to those of SAELens: a weights file and its squared error."""

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.weights.loss_weights import Gamma, LossWeights


def read_weights(path: str, d_in: int) -> LossWeights:
    """The weights of a file, for rows of ``d_in`` dimensions.

    Raises UsageError for a file that is not named, or whose weights SAELens' training cannot use
    (a space, annealing); LlmWsaeError for one that cannot be read or is for another number of
    dimensions.
    """
    if not path:
        raise UsageError("weights_file is not given; make one with llm-wsae weigh")
    weights = LossWeights.load(Path(path))
    if len(weights.gamma) != d_in:
        raise LlmWsaeError(
            f"{path} has weights for {len(weights.gamma)} dimensions, but the rows have {d_in}; "
            "make them from a store of the same site"
        )
    if weights.config.in_space:
        raise UsageError(
            f"{path} is for training in a weighted space, but SAELens trains on the rows as they "
            "are; make the weights with place loss"
        )
    if weights.config.anneal:
        raise UsageError(
            f"{path} has weights that move to 1 during training, which SAELens does not support; "
            "make them without anneal"
        )
    return weights


def squared_error(
    x_hat: Float[Tensor, "*rows d_in"], x: Float[Tensor, "*rows d_in"], gamma: Gamma
) -> Float[Tensor, "*rows d_in"]:
    """(Γ(x̂ − x))² by dimension: summed over a row ‖Γ(x − x̂)‖² (Cui et al. 2026, theorem 5)."""
    error = x_hat - x
    gamma = gamma.to(error.dtype)
    return (error @ gamma.T if gamma.ndim == 2 else error * gamma) ** 2
