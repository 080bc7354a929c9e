"""ReLU with an L1 penalty: the classic sparse autoencoder, and the paper's second one.

Half of all latents are active at the start and their number falls only with training. While they
are many, products are dense, in tiles of rows that bound the memory; once they are few, the sparse
operations take over. Both are the same loss and the same gradients, but for rounding.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.sparse.operations import encode_above
from llm_wsae.statistics.weights import Gamma
from llm_wsae.train.along import exact, step_along, without_masked
from llm_wsae.train.parameters import Batch, Parameters, Step, weighted_error

_TILE_ROWS = 1024
_COUNTED_ROWS = 256  # enough to tell a share of 1/64 from another
_FEW = 1 / 64
"""Share of active latents below which the sparse step is the faster one. A sparse latent costs its
rows of both matrices, a dense one its part of four matrix products."""


def relu_step(parameters: Parameters, batch: Batch, gamma: Gamma, l1: float) -> Step:
    """Loss ‖Γ(x − x̂)‖² + l1·Σ_j z_j (means over rows; the first also over dimensions).

    Decoder rows have unit norm, so the plain sum of the latents is the penalty of the literature. A
    coefficient for a loss that sums over dimensions is d_in times this one.
    """
    share = _active_share(parameters, batch)
    step = sparse_relu_step if share < _FEW else dense_relu_step
    return step(parameters, batch, gamma, l1)


def sparse_relu_step(parameters: Parameters, batch: Batch, gamma: Gamma, l1: float) -> Step:
    """``relu_step`` along the active latents only."""
    fast = batch.x_fast.dtype
    codes = encode_above(
        batch.x_fast,
        parameters.encoder.to(fast),
        parameters.encoder_bias.to(fast),
        torch.zeros_like(parameters.encoder_bias),
    )
    codes = exact(without_masked(codes, batch), parameters, batch)
    push = _push(batch, l1)
    step = step_along(codes, parameters, batch, gamma, push)
    penalty = push * batch.split.over_latents(codes.values.sum())
    return step._replace(loss=step.loss + penalty)


def dense_relu_step(parameters: Parameters, batch: Batch, gamma: Gamma, l1: float) -> Step:
    """``relu_step`` over all latents, a tile of rows at a time."""
    encoder, decoder, encoder_bias, decoder_bias = parameters
    fast = batch.x_fast.dtype
    encoder_fast, decoder_fast = encoder.to(fast), decoder.to(fast)
    bias_fast = encoder_bias.to(fast)
    gradients = Parameters(
        torch.zeros_like(decoder),  # the encoder may be the rounded one
        *map(torch.zeros_like, (decoder, encoder_bias, decoder_bias)),
    )
    residual = torch.empty_like(batch.x)
    firings = torch.zeros_like(encoder_bias)
    loss = batch.x.new_zeros(())
    push, over_latents = _push(batch, l1), batch.split.over_latents
    for start in range(0, len(batch.x), _TILE_ROWS):
        rows = slice(start, start + _TILE_ROWS)
        x, x_fast, mask = batch.x[rows], batch.x_fast[rows], batch.mask[rows]
        latents = torch.addmm(bias_fast, x_fast, encoder_fast.T).relu_()
        latents[mask == 0] = 0
        active = latents > 0
        decoded = over_latents((latents @ decoder_fast).to(x.dtype))
        residual[rows] = decoded.add_(decoder_bias).sub_(x).mul_(mask[:, None])
        tile_loss, by_output = weighted_error(
            residual[rows], batch.counted[rows], gamma, batch.num_rows
        )
        loss += tile_loss + push * over_latents(latents.sum(dtype=x.dtype))
        by_output_fast = by_output.to(fast)
        by_latent = by_output_fast @ decoder_fast.T
        by_latent.add_(push.to(fast)).mul_(active)
        gradients.encoder.add_(by_latent.T @ x_fast)
        gradients.decoder.add_(latents.T @ by_output_fast)
        gradients.encoder_bias.add_(by_latent.sum(0, dtype=x.dtype))
        gradients.decoder_bias.add_(by_output.sum(0))
        firings += active.sum(0)
    return Step(gradients[:3], gradients.decoder_bias, residual, firings, loss)


def _push(batch: Batch, l1: float) -> Float[Tensor, ""]:
    """Gradient of the penalty by an active latent."""
    return l1 / batch.num_rows


def _active_share(parameters: Parameters, batch: Batch) -> float:
    """Which share of the latents is active, counted on some rows spread over the batch."""
    fast = batch.x_fast.dtype
    x = batch.x_fast[:: max(1, len(batch.x_fast) // _COUNTED_ROWS)]
    bias = parameters.encoder_bias.to(fast)
    pre = torch.addmm(bias, x, parameters.encoder.to(fast).T)
    active = batch.split.over_latents((pre > 0).sum())
    return float(active) / max(1, pre.numel() * batch.split.latent_parts)
