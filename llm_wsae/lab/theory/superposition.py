"""Superposition whose true features are known.

n true features x, sparse and non-negative, are mixed into n_p < n observed dimensions,
x_p = W_p x (Elhage et al. 2022, "Toy Models of Superposition"). A dictionary sees only x_p, and
what it finds can be compared with x. The mixtures W_p:

- ``digon_mixing``: dimensions with one feature, and dimensions with an antipodal pair (a digon),
  the position in which the closed form is exact;
- ``toy_model``: W_p trained from scratch to reconstruct x, so that nobody chose which features
  share dimensions; the toy experiment of Cui et al. 2026.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_TOY_BATCH, _TOY_RATE = 512, 1e-2


@dataclass(frozen=True)
class Superposition:
    """Independent true features of equal frequency and strength, and how they are mixed:
    x_p = W_p x."""

    mixing: Float[Tensor, "n_p n"]
    """W_p: column j is the observed direction of true feature j."""
    sparsity: float
    """S, the probability that a feature is 0; otherwise it is uniform on (0, 1]."""

    @property
    def num_features(self) -> int:
        """n, the number of true features."""
        return self.mixing.shape[1]

    @property
    def mean_active(self) -> float:
        """Mean number of true features that are not 0 in a row."""
        return self.num_features * (1 - self.sparsity)

    def features(self, rows: int, generator: torch.Generator) -> Float[Tensor, "rows n"]:
        """Draw true features x."""
        size, dtype = (rows, self.num_features), self.mixing.dtype
        uniform = torch.rand(size, generator=generator, dtype=dtype)
        return features_from_uniform(uniform, self.sparsity)

    def observe(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n_p"]:
        """What a dictionary sees of true features: x_p = W_p x."""
        return x @ self.mixing.T


def features_from_uniform(
    uniform: Float[Tensor, "*rows n"], sparsity: float
) -> Float[Tensor, "*rows n"]:
    """True features from one uniform number each: a feature is active if its number is below the
    probability 1 − S, and the further below, the stronger. The same numbers at another sparsity
    give comparable rows."""
    probability = 1 - sparsity
    if probability == 0:
        return torch.zeros_like(uniform)
    return (1 - uniform / probability).clamp(min=0)


def digon_mixing(singles: int, digons: int) -> Float[Tensor, "n_p n"]:
    """W_p with one feature alone on each of the first dimensions, an antipodal pair on the rest."""
    mixing = torch.zeros(singles + digons, singles + 2 * digons)
    mixing[:singles, :singles] = torch.eye(singles)
    for i in range(digons):
        mixing[singles + i, singles + 2 * i] = 1
        mixing[singles + i, singles + 2 * i + 1] = -1
    return mixing


def toy_model(
    n: int, n_p: int, sparsity: float, generator: torch.Generator, steps: int = 1500
) -> Float[Tensor, "n_p n"]:
    """W_p of a toy model of superposition trained from scratch.

    W_p = argmin E‖x − ReLU(W_pᵀ W_p x)‖², all features equally important, no bias (the setting of
    Cui et al. 2026; Elhage et al. 2022 with the bias left out), by Adam whose rate falls to 0.
    """
    data = Superposition(torch.empty(n_p, n), sparsity)
    mixing = (torch.randn(n_p, n, generator=generator) / n_p**0.5).requires_grad_()
    optimiser = torch.optim.Adam([mixing], lr=_TOY_RATE)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = _TOY_RATE * (1 - step / steps)
        x = data.features(_TOY_BATCH, generator)
        optimiser.zero_grad()
        missed = x - ((x @ mixing.T) @ mixing).relu()
        (missed.square().sum() / _TOY_BATCH).backward()
        optimiser.step()
    return mixing.detach()
