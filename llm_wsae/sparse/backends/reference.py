"""What each sparse operation means, written densely: the definition the others are tested against.

Holds batch × d_sae, so it is for tests, in any dtype; float64 gives the numbers to compare with.
Where entries tie, which of them is chosen is not part of the definition.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.sparse.codes import Codes, RaggedCodes, SlotCapacity, SparseGradients, SubsetGradients

BETAS = (0.9, 0.999)
"""Of Adam, as in torch.optim.Adam."""
EPSILON = 1e-15
"""Of Adam. torch's 1e-8 is no small number beside the gradients of a loss that is a mean over
dimensions, where its weights are steep: dimensions that count little would hardly move."""
SMALLEST_NORM = 1e-8
"""A decoder row is divided by its norm, or by this if it is smaller."""

Gradients = tuple[Tensor, Tensor, Tensor]
"""By the encoder [d_sae, d_in], the decoder [d_sae, d_in] and the encoder's bias [d_sae]."""


def encode_topk(x: Tensor, encoder: Tensor, bias: Tensor, k: int) -> Codes:
    """See ``operations``."""
    best = select_topk(_pre(x, encoder, bias), k)
    return Codes(best.indices, best.values.relu())


def encode_above(
    x: Tensor,
    encoder: Tensor,
    bias: Tensor,
    threshold: Tensor,
    capacity: SlotCapacity | None = None,
) -> RaggedCodes:
    """See ``operations``. Ignores ``capacity``: the codes have exactly the slots they need."""
    pre = _pre(x, encoder, bias)
    return _sparse(pre, pre > threshold)


def encode_batch_topk(
    x: Tensor,
    encoder: Tensor,
    bias: Tensor,
    k: int,
    guess: float | Tensor,
    kept: Tensor | None = None,
) -> RaggedCodes:
    """See ``operations``."""
    kept = torch.ones(len(x), dtype=torch.bool, device=x.device) if kept is None else kept
    pre = _pre(x, encoder, bias).relu() * kept[:, None]
    best = pre.flatten().topk(min(k * int(kept.sum()), pre.numel())).indices
    chosen = torch.zeros(pre.numel(), dtype=torch.bool, device=pre.device)
    chosen[best] = True
    return _sparse(pre, chosen.view_as(pre) & (pre > 0))


def select_topk(pre: Tensor, k: int) -> Codes:
    """See ``operations``."""
    values, indices = pre.topk(k, dim=1)
    return Codes(indices, values)


def encode_dead(x: Tensor, encoder: Tensor, bias: Tensor, dead: Tensor | None, k: int) -> Tensor:
    """See ``operations``."""
    active = torch.addmm(bias, x, encoder.T).relu()
    if dead is not None:
        active = active * dead
    if k >= len(encoder):
        return active
    return active * (active >= active.sort(dim=1, descending=True).values[:, k - 1 : k])


def dead_gradients(
    active: Tensor, x: Tensor, decoder: Tensor, output_gradient: Tensor, sums: SubsetGradients
) -> None:
    """See ``operations``."""
    exact = sums.bias.dtype
    active, x, decoder, by_output = (t.to(exact) for t in (active, x, decoder, output_gradient))
    by_latent = (by_output @ decoder.T) * (active > 0)
    sums.encoder.add_(by_latent.T @ x)
    sums.decoder.add_(active.T @ by_output)
    sums.bias.add_(by_latent.sum(0))


def decode(codes: RaggedCodes, decoder: Tensor, bias: Tensor) -> Tensor:
    """See ``operations``."""
    return dense(codes, codes.values, len(decoder)).to(decoder.dtype) @ decoder + bias


def value_gradients(codes: RaggedCodes, decoder: Tensor, output_gradient: Tensor) -> Tensor:
    """See ``operations``."""
    by_latent = output_gradient @ decoder.to(output_gradient.dtype).T
    return by_latent[codes.rows(), codes.indices] * (codes.values > 0)


def weight_gradients(gradients: SparseGradients, d_sae: int) -> Gradients:
    """See ``operations``, where ``gradients.more`` is added."""
    codes, x, output_gradient, by_value, _ = gradients
    by_latent = dense(codes, by_value, d_sae)
    latents = dense(codes, codes.values, d_sae)
    x = x.to(by_latent.dtype).repeat(len(output_gradient) // max(1, len(x)), 1)
    return by_latent.T @ x, latents.T @ output_gradient.to(x.dtype), by_latent.sum(0)


def firing_counts(codes: RaggedCodes, d_sae: int) -> Tensor:
    """See ``operations``."""
    return dense(codes, (codes.values > 0).to(codes.values.dtype), d_sae).sum(0)


def adam_rows(
    rows: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    means: tuple[Tensor, Tensor],
    squares: tuple[Tensor, Tensor],
    step: int,
    learning_rate: float,
    encoder_fast: Tensor | None,
) -> None:
    """See ``operations``."""
    (beta1, beta2), (encoder, decoder) = BETAS, rows
    for row, gradient, mean, square in zip(rows, gradients, means, squares, strict=True):
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square / (1 - beta2**step)).sqrt() + EPSILON
        row -= learning_rate / (1 - beta1**step) * mean / root
    decoder /= decoder.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM)
    if encoder_fast is not None:
        encoder_fast.copy_(encoder)


def dense(
    codes: RaggedCodes, slots: Float[Tensor, " active"], d_sae: int
) -> Float[Tensor, "batch d_sae"]:
    """A number for every slot of the codes, at its row and latent."""
    out = torch.zeros(codes.num_rows, d_sae, dtype=slots.dtype, device=slots.device)
    return out.index_put_((codes.rows(), codes.indices), slots, accumulate=True)


def _pre(x: Tensor, encoder: Tensor, bias: Tensor) -> Tensor:
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.addmm(bias, x, encoder.T).to(exact)


def _sparse(pre: Tensor, active: Tensor) -> RaggedCodes:
    offsets = torch.zeros(len(pre) + 1, dtype=torch.int64, device=pre.device)
    offsets[1:] = active.sum(1).cumsum(0)
    return RaggedCodes(active.nonzero()[:, 1], pre[active], offsets)
