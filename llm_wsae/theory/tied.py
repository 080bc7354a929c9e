"""Tied TopK dictionaries on planted data, all arms of a seed at once.

The dictionary of the theory: x̂ = Wᵀ TopK(ReLU(W x)), encoder and decoder one matrix W, no bias.
A planted problem is tiny (20 dimensions, 50 latents), so all arms are one batch of matrix products.
They start from the same W and see the same rows, so their differences are paired.

Gradients are written by hand; the k-th largest pre-activation comes from numpy's sort, whose vector
instructions make it several times faster here than torch's top-k.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_wsae.sparse.backends.reference import BETAS, EPSILON
from llm_wsae.theory.superposition import Planted
from llm_wsae.weights.loss_weights import annealed

_DECAY = 0.3  # share of the steps, at the end, over which the learning rate decays to 0
_IN_CACHE = 4  # arms whose pre-activations stay in a core's cache: a third faster than all at once
_STEPS_DRAWN = 16  # steps whose rows are drawn together


@dataclass(frozen=True)
class Schedule:
    """How dictionaries are trained."""

    num_latents: int
    k: int
    """Latents kept in a row."""
    steps: int
    batch: int
    """Rows per step."""
    learning_rate: float
    """Of Adam: constant, then a linear decay to 0 over the last 30 % of the steps."""
    anneal: float = 0.6
    """Share of the steps over which an annealed γ goes to 1, from the first step on: the meaning
    of ``--anneal``, and the value of the studies on real models."""


def train_tied(
    data: Planted,
    gamma: Float[Tensor, "arms n_p"] | Float[Tensor, "arms n_p n_p"],
    is_annealed: Bool[Tensor, " arms"],
    scale: Float[Tensor, "arms n_p"],
    schedule: Schedule,
    seed: int,
    check: Callable[[], None] = lambda: None,
) -> Float[Tensor, "arms latents n_p"]:
    """W of every arm, trained on ‖Γ(x − x̂)‖² in the space of ``scale`` · x_p.

    ``gamma`` holds weights of dimensions, or the matrices Γ. ``is_annealed`` marks the arms whose γ
    goes to 1. The result of an arm does not depend on the other arms, except for rounding in the
    batched products. ``check`` is called before every step and may raise, which ends the training.
    """
    num_arms, n_p = gamma.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    start = initial(schedule.num_latents, n_p, generator)
    w = start.expand(num_arms, -1, -1).contiguous()
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    beta1, beta2 = BETAS
    now, moving = gamma.float().clone(), is_annealed.nonzero()[:, 0].tolist()
    for step, rows in enumerate(_batches(data, generator, schedule)):
        check()
        x = rows * scale[:, None].float()  # arms, batch, n_p
        for arm in moving:
            now[arm] = annealed(gamma[arm], step / schedule.steps, schedule.anneal)
        squared = now.square()[:, None] if now.ndim == 2 else now.transpose(1, 2) @ now
        size = _IN_CACHE
        parts = zip(w.split(size), x.split(size), squared.split(size), strict=True)
        gradient = torch.cat([tied_gradient(*part, k=schedule.k) for part in parts])
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        left = (schedule.steps - step) / max(1.0, _DECAY * schedule.steps)
        rate = schedule.learning_rate * min(1.0, left) / (1 - beta1 ** (step + 1))
        root = (second / (1 - beta2 ** (step + 1))).sqrt_().add_(EPSILON)
        w.addcdiv_(first, root, value=-rate)
    return w


def initial(latents: int, n_p: int, generator: torch.Generator) -> Float[Tensor, "latents n_p"]:
    """W before the first step: rows of length 1 in random directions."""
    start = torch.randn(latents, n_p, generator=generator)
    return start / start.norm(dim=1, keepdim=True)


def encode_tied(
    w: Float[Tensor, "*arms latents n_p"], x: Float[Tensor, "*arms rows n_p"], k: int
) -> Float[Tensor, "*arms rows latents"]:
    """Codes as a dense matrix: the k largest pre-activations of every row, if positive."""
    return _keep_largest(torch.matmul(x, w.transpose(-1, -2)), k)


def tied_gradient(
    w: Float[Tensor, "arms latents n_p"],
    x: Float[Tensor, "arms rows n_p"],
    gamma_squared: Float[Tensor, "arms 1 n_p"] | Float[Tensor, "arms n_p n_p"],
    k: int,
) -> Float[Tensor, "arms latents n_p"]:
    """Gradient of the mean ‖Γ(x − Wᵀz)‖² over rows, z = TopK(ReLU(W x)), through both uses of W.

    ``gamma_squared`` is γ², or ΓᵀΓ.
    """
    z = _keep_largest(torch.bmm(x, w.transpose(1, 2)), k)
    error = torch.baddbmm(x, z, w, beta=-1)
    is_matrix = gamma_squared.shape[1] > 1
    error = torch.bmm(error, gamma_squared) if is_matrix else error.mul_(gamma_squared)
    through = torch.bmm(error, w.transpose(1, 2))
    through = torch.ops.aten.threshold_backward(through, z, 0.0)  # 0 where z is
    gradient = torch.bmm(z.transpose(1, 2), error)
    return gradient.baddbmm_(through.transpose(1, 2), x).mul_(2 / x.shape[1])


def _keep_largest(pre: Tensor, k: int) -> Tensor:
    """ReLU and TopK in place. Values equal to the k-th largest all stay."""
    pre.relu_()
    if k < pre.shape[-1]:
        kth = torch.from_numpy(np.sort(pre.numpy(), axis=-1)[..., -k, None])
        pre.masked_fill_(pre < kth, 0.0)
    return pre


def _batches(data: Planted, generator: torch.Generator, schedule: Schedule) -> Iterator[Tensor]:
    """Observed rows [batch, n_p] for every step."""
    for done in range(0, schedule.steps, _STEPS_DRAWN):
        count = min(_STEPS_DRAWN, schedule.steps - done)
        x = data.features(count * schedule.batch, generator)
        yield from data.observe(x).float().split(schedule.batch)
