"""Rules: each turns the statistics of a site into one score s per dimension.

A score estimates how monosemantic a dimension is; ``weights.py`` makes the loss weights γ = s^α
from it. A rule is a function in this file and a line in ``RULES``, nowhere else.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import UsageError, nearest
from llm_wsae.statistics.moments import Statistics

Rule = Callable[[Statistics], Tensor]


def uniform(statistics: Statistics) -> Float[Tensor, " d_in"]:
    """s = 1: the plain sparse autoencoder, the control of every other rule."""
    return torch.ones(statistics.d_in, dtype=torch.float64)


def variance(statistics: Statistics) -> Float[Tensor, " d_in"]:
    """s_i = Var(x_i) over all rows: the proxy of Cui et al. 2026 (arXiv 2506.15963, §5)."""
    return statistics.variance


def robust_variance(statistics: Statistics) -> Float[Tensor, " d_in"]:
    """s_i = winsorised Var(x_i): the paper's proxy, which massive activations cannot move."""
    return statistics.robust_variance


RULES: dict[str, Rule] = {
    "uniform": uniform,
    "variance": variance,
    "robust-variance": robust_variance,
}


def score(rule: str, statistics: Statistics) -> Float[Tensor, " d_in"]:
    """The score of every dimension under a named rule (float64, one per dimension).

    Raises UsageError when there is no such rule.
    """
    check_rule(rule)
    return RULES[rule](statistics)


def check_rule(rule: str) -> None:
    """Raises UsageError, offering the nearest ones, when there is no such rule."""
    if rule not in RULES:
        raise UsageError(f"there is no weight rule {rule!r}; {nearest(rule, RULES)}")
