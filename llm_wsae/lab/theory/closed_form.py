"""The closed form of Cui et al. 2026 (arXiv 2506.15963), and when it can be trusted.

True features x ≥ 0 are seen as x_p = W_p x. A tied sparse autoencoder W_m encodes
x_m = ReLU(W_m x_p) and reconstructs x̂_p = W_mᵀ x_m. With W_m = (W_p, 0)ᵀ what it recovers of x is

    r = ReLU(W_pᵀ W_p x),

and everything below follows from r: which features shrink, which vanish, and how far the training
loss (on x_p) is from the loss one wants (on x).

When is W_m = (W_p, 0)ᵀ the optimum (theorem 1), and the only one (theorem 3)? The paper assumes
unit columns with non-positive interference, which allows at most 2·n_p features. For a ReLU without
a penalty on the codes, this module's tests establish:

- in antipodal pairs (digons) the reconstruction is exact at any sparsity, so it is optimal;
- three features at 120° (a polygon) leave a loss on dense inputs, and W_pᵀ is not even a local
  optimum: descent from it finds 7 % less at S = 0. On 1-sparse inputs the loss is 0, so optimal;
- a single digon has a unique optimum, up to order. Otherwise it is not unique: with
  n_m ≥ 2·n_p the dictionary (Q, −Q)ᵀ of *any* orthogonal Q reconstructs everything, and the
  triangle has a second solution of loss 0 on 1-sparse inputs, at −√2 times its features.

So beyond a single digon something else must choose among equal optima: a penalty, or TopK.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from llm_wsae.lab.theory.optimum import Weights, gap_matrix, weighted
from llm_wsae.lab.theory.superposition import features_from_uniform

_TOLERANCE = 1e-6
_SPARSEST = 0.9999
_BISECTIONS = 40


def recovered(
    mixing: Float[Tensor, "n_p n"], x: Float[Tensor, "rows n"]
) -> Float[Tensor, "rows n"]:
    """r = ReLU(W_pᵀ W_p x), what the closed form recovers of the true features (theorem 1)."""
    return (x @ (mixing.T @ mixing)).relu()


def sae_loss(
    dictionary: Float[Tensor, "latents n_p"],
    x_p: Float[Tensor, "rows n_p"],
    weights: Weights | None = None,
) -> Float[Tensor, ""]:
    """L_SAE = E‖x_p − W_mᵀ ReLU(W_m x_p)‖² of a tied dictionary W_m; with weights the weighted
    L_WSAE = E‖Γ(x_p − x̂_p)‖²."""
    error = x_p - (x_p @ dictionary.T).relu() @ dictionary
    return weighted(error, weights).square().sum(1).mean()


def truth_loss(mixing: Float[Tensor, "n_p n"], x: Float[Tensor, "rows n"]) -> Float[Tensor, ""]:
    """L_GT = E‖x − r‖², the loss on the true features at W_m = (W_p, 0)ᵀ."""
    return (x - recovered(mixing, x)).square().sum(1).mean()


def loss_gap(
    mixing: Float[Tensor, "n_p n"], x: Float[Tensor, "rows n"], weights: Weights | None = None
) -> Float[Tensor, ""]:
    """L_WSAE − L_GT = E (x − r)ᵀ (W_pᵀ ΓᵀΓ W_p − I)(x − r) at the closed form (theorems 4, 5)."""
    lost = x - recovered(mixing, x)
    return ((lost @ gap_matrix(mixing, weights)) * lost).sum(1).mean()


def relative_error(mixing: Float[Tensor, "n_p n"], x: Float[Tensor, "rows n"]) -> Float[Tensor, ""]:
    """L_GT / E‖x‖²: the share of the true features' energy that the closed form misses."""
    return truth_loss(mixing, x) / x.square().sum(1).mean()


def sparsity_for_error(
    mixing: Float[Tensor, "n_p n"], bound: float, generator: torch.Generator, rows: int = 20_000
) -> float | None:
    """The sparsity S above which the relative error stays within ``bound`` (theorem 2: it falls to
    0 as S → 1). For digons alone it is 1 − 2·bound.

    Features are uniform on (0, 1]; found by bisection over the same random numbers at every S.
    None where no S suffices because even a single active feature is not recovered: columns that are
    not of unit length shrink it, and positive interference makes others appear.
    """
    single = torch.eye(mixing.shape[1], dtype=mixing.dtype)  # all there is as S → 1
    if float(relative_error(mixing, single)) > bound:
        return None
    uniform = torch.rand(rows, mixing.shape[1], generator=generator, dtype=mixing.dtype)

    def error(sparsity: float) -> float:
        x = features_from_uniform(uniform, sparsity)
        return float(relative_error(mixing, x)) if bool((x > 0).any()) else 0.0

    if error(0.0) <= bound:
        return 0.0
    low, high = 0.0, _SPARSEST
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if error(middle) <= bound else (middle, high)
    return high


@dataclass(frozen=True)
class Losses:
    """What the closed form loses of each true feature; NaN for one that is never active."""

    shrunk: Float[Tensor, " n"]
    """Of the rows where the feature is active, the share on which 0 < r < x."""
    vanished: Float[Tensor, " n"]
    """Of the rows where the feature is active, the share on which r = 0."""


def losses(mixing: Float[Tensor, "n_p n"], x: Float[Tensor, "rows n"]) -> Losses:
    """Feature shrinking and feature vanishing (Cui et al. 2026, §3.2) on given true features."""
    r, active = recovered(mixing, x), x > 0
    # A relative margin: rounding must not count as shrinking where recovery is exact.
    shrunk = active & (r > 0) & (r < x * (1 - _TOLERANCE))
    vanished = active & (r == 0)
    return Losses(shrunk.sum(0) / active.sum(0), vanished.sum(0) / active.sum(0))


@dataclass(frozen=True)
class Assumptions:
    """Whether W_p is in the position that theorem 1 assumes."""

    largest_interference: float
    """Largest w_iᵀ w_j, i ≠ j: at most 0 in digon or polygon position."""
    largest_norm_error: float
    """Largest |‖w_j‖ − 1| over the columns that are not 0."""
    groups: tuple[tuple[int, ...], ...]
    """Groups of features that interfere with each other: one is alone, two are a digon, more a
    polygon."""

    @property
    def hold(self) -> bool:
        """Unit columns with non-positive interference."""
        return self.largest_interference <= _TOLERANCE and self.largest_norm_error <= _TOLERANCE

    @property
    def only_digons(self) -> bool:
        """Unit columns, each alone or in an antipodal pair: where the reconstruction is exact."""
        return self.hold and all(len(group) <= 2 for group in self.groups)


def check_assumptions(mixing: Float[Tensor, "n_p n"]) -> Assumptions:
    """The assumptions of theorem 1 for a given W_p; columns of length below 1e-6 count as 0.

    At most 2·n_p vectors of an n_p-dimensional space have pairwise non-positive inner products
    (the axes and their opposites reach it), so n > 2·n_p rules the assumption out.
    """
    norms = mixing.norm(dim=0)
    present = (norms > _TOLERANCE).nonzero()[:, 0]
    gram = mixing[:, present].T @ mixing[:, present]
    off = gram - torch.diag(gram.diagonal())
    others = ~torch.eye(len(present), dtype=torch.bool)
    number, group = connected_components((off.abs() > _TOLERANCE).numpy())
    members = [present[torch.from_numpy(group == one)].tolist() for one in range(number)]
    return Assumptions(
        largest_interference=float(gram[others].max()) if len(present) > 1 else 0.0,
        largest_norm_error=float((norms[present] - 1).abs().max()) if len(present) else 0.0,
        groups=tuple(map(tuple, members)),
    )
