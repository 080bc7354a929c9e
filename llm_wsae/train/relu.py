"""ReLU with an L1 penalty: the classic sparse autoencoder, and the paper's second one.

Half of all latents are active at the start and their number falls only with training, so the
products are dense here, in tiles of rows that bound the memory.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.train.parameters import Batch, Parameters, Step, weighted_error

_TILE_ROWS = 1024


def relu_step(
    parameters: Parameters, batch: Batch, gamma: Float[Tensor, " d_in"], l1: float
) -> Step:
    """Loss ‖Γ(x − x̂)‖² + l1·Σ_j z_j (means over rows; the first also over dimensions).

    Decoder rows have unit norm, so the plain sum of the latents is the penalty of the literature.
    """
    encoder, decoder, encoder_bias, decoder_bias = parameters
    fast = batch.x_fast.dtype
    encoder_fast, decoder_fast = encoder.to(fast), decoder.to(fast)
    bias_fast = encoder_bias.to(fast)
    gradients = Parameters(*(torch.zeros_like(p) for p in parameters))
    residual = torch.empty_like(batch.x)
    firings = torch.zeros_like(encoder_bias)
    loss = batch.x.new_zeros(())
    num_rows = batch.mask.sum().clamp(min=1)
    pushed = (l1 / num_rows) * batch.mask
    for start in range(0, len(batch.x), _TILE_ROWS):
        rows = slice(start, start + _TILE_ROWS)
        x, x_fast, mask = batch.x[rows], batch.x_fast[rows], batch.mask[rows]
        latents = torch.addmm(bias_fast, x_fast, encoder_fast.T).relu_()
        active = latents > 0
        residual[rows] = (
            (latents @ decoder_fast).to(x.dtype).add_(decoder_bias).sub_(x).mul_(mask[:, None])
        )
        tile_loss, by_output = weighted_error(residual[rows], mask, gamma)
        share = mask.sum().clamp(min=1) / num_rows  # the tile's mean becomes the batch's
        by_output *= share
        loss += tile_loss * share + (latents.sum(1, dtype=x.dtype) * pushed[rows]).sum()
        by_output_fast = by_output.to(fast)
        by_latent = by_output_fast @ decoder_fast.T
        by_latent.add_(pushed[rows, None].to(fast)).mul_(active)
        gradients.encoder.add_(by_latent.T @ x_fast)
        gradients.decoder.add_(latents.T @ by_output_fast)
        gradients.encoder_bias.add_(by_latent.sum(0, dtype=x.dtype))
        gradients.decoder_bias.add_(by_output.sum(0))
        firings += active.sum(0)
    return Step(gradients, residual, firings, loss)
