"""What each sparse operation means, written densely: the definition all backends are tested by.

Holds batch × d_sae, in any dtype; float64 gives the numbers to compare with. Where entries tie,
which of them is chosen is not part of the definition. For ``operations.using``.
"""

import torch
from torch import Tensor

from llm_wsae.sparse.codes import (
    BETAS,
    EPSILON,
    SMALLEST_NORM,
    Codes,
    RaggedCodes,
    Reconstruction,
    exact_dtype,
    offsets_of,
)
from llm_wsae.sparse.operations import adam_raw


def encode_topk(product, k):
    best = select_topk(_pre(product), k)
    return Codes(best.indices, best.values.relu())


def encode_above(product, threshold, capacity=None):
    pre = _pre(product)
    return _sparse(pre, pre > threshold)


def encode_batch_topk(product, k, guess, kept=None):
    kept = torch.ones(len(product.x), dtype=torch.bool) if kept is None else kept
    pre = _pre(product).relu() * kept[:, None]
    best = pre.flatten().topk(min(k * int(kept.sum()), pre.numel())).indices
    chosen = torch.zeros(pre.numel(), dtype=torch.bool, device=pre.device)
    chosen[best] = True
    return _sparse(pre, chosen.view_as(pre) & (pre > 0))


def select_topk(pre, k):
    values, indices = pre.topk(k, dim=1)
    return Codes(indices, values)


def encode_dead(product, dead, k):
    active = product.pre().relu()
    if dead is not None:
        active = active * dead
    if k >= len(product.encoder):
        return active
    return active * (active >= active.sort(dim=1, descending=True).values[:, k - 1 : k])


def dead_gradients(active, x, decoder, output_gradient, sums):
    exact = sums.bias.dtype
    active, x, decoder, by_output = (t.to(exact) for t in (active, x, decoder, output_gradient))
    by_latent = (by_output @ decoder.T) * (active > 0)
    sums.encoder.add_(by_latent.T @ x)
    sums.decoder.add_(active.T @ by_output)
    sums.bias.add_(by_latent.sum(0))


def decode(codes, decoder, bias):
    return dense(codes, codes.values, len(decoder)).to(decoder.dtype) @ decoder + bias


def value_gradients(codes, decoder, output_gradient):
    by_latent = output_gradient @ decoder.to(output_gradient.dtype).T
    return by_latent[codes.rows(), codes.indices] * (codes.values > 0)


def reconstruct(codes, target, fast):
    decoder, bias, x, row_weights, column_weights = target
    residual = (decode(codes, decoder, bias) - x) * row_weights[:, None]
    gradient = residual * column_weights
    by_value = value_gradients(codes, decoder, gradient)
    return Reconstruction(residual, gradient.to(fast), by_value, (residual * gradient).sum(1))


def weight_gradients(gradients, d_sae):
    codes, x, output_gradient, by_value, _ = gradients
    by_latent = dense(codes, by_value, d_sae)
    latents = dense(codes, codes.values, d_sae)
    x = x.to(by_latent.dtype).repeat(len(output_gradient) // max(1, len(x)), 1)
    return by_latent.T @ x, latents.T @ output_gradient.to(x.dtype), by_latent.sum(0)


def sparse_adam(latents, gradients, step, learning_rate, raw=None):
    sums = weight_gradients(gradients, len(latents.encoder))
    if gradients.more is not None:
        gradients.more.add_to(sums)
    if raw is None:
        adam(latents, sums, step, learning_rate)
    else:  # test_free_lengths.py compares it with autograd
        adam_raw(latents, sums, step, learning_rate, raw)
    return sums[2]


def adam(latents, gradients, step, learning_rate):
    beta1, beta2 = BETAS
    pairs = (latents[:2], gradients[:2], latents[2:4], latents[4:6])
    for row, gradient, mean, square in zip(*pairs, strict=True):
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square / (1 - beta2**step)).sqrt() + EPSILON
        row -= learning_rate / (1 - beta1**step) * mean / root
    latents.decoder.div_(latents.decoder.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM))
    if latents.encoder_fast is not None:
        latents.encoder_fast.copy_(latents.encoder)


def dense(codes: RaggedCodes, slots: Tensor, d_sae: int) -> Tensor:
    """[batch, d_sae]: a number for every slot of the codes, at its row and latent."""
    out = torch.zeros(codes.num_rows, d_sae, dtype=slots.dtype, device=slots.device)
    return out.index_put_((codes.rows(), codes.indices), slots, accumulate=True)


def _pre(product):
    return product.pre().to(exact_dtype(product.x))


def _sparse(pre, active):
    return RaggedCodes(active.nonzero()[:, 1], pre[active], offsets_of(active.sum(1)))
