"""AuxK (Gao et al. 2024, §A.2): dead latents learn to explain what the living ones leave over.

The dead latents with the largest pre-activations reconstruct the residual, in the same weighted
norm as the main loss. Few latents are dead, so their products are dense over that subset.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.statistics.weights import Gamma
from llm_wsae.train.parameters import Batch, Parameters, squared, times

_TILE_ROWS = 1024


def add_auxk_gradients(
    gradients: Parameters,
    parameters: Parameters,
    batch: Batch,
    residual: Float[Tensor, "batch d_in"],
    dead: Int[Tensor, " dead"],
    gamma: Gamma,
    coefficient: float,
) -> Float[Tensor, ""]:
    """Add the gradients of coefficient · ‖Γ(e − ê)‖² / ‖Γe‖² to those of the dead latents.

    e = x − x̂ is a constant here, and ê has no bias: b_dec is part of x̂ already. At most d_in / 2
    dead latents take part in a row. ``dead`` are indices among the latents that are here. Returns
    the auxiliary loss before its coefficient.
    """
    fast = batch.x_fast.dtype
    encoder, decoder = parameters.encoder[dead].to(fast), parameters.decoder[dead].to(fast)
    bias = parameters.encoder_bias[dead].to(fast)
    num_dead = batch.split.count_latents(len(dead))
    if num_dead == 0:
        return residual.new_zeros(())
    k_aux = min(num_dead, max(1, batch.x.shape[1] // 2))
    metric = squared(gamma)
    unexplained = batch.split.over_rows((times(residual, metric) * residual).sum())
    scale = 1 / unexplained.clamp(min=1e-12)
    by_encoder = torch.zeros(encoder.shape, device=residual.device, dtype=residual.dtype)
    by_decoder = torch.zeros_like(by_encoder)
    by_bias = torch.zeros(len(dead), device=residual.device, dtype=residual.dtype)
    loss = residual.new_zeros(())
    for start in range(0, len(residual), _TILE_ROWS):
        rows = slice(start, start + _TILE_ROWS)
        x_fast, mask = batch.x_fast[rows], batch.mask[rows, None]
        latents = torch.addmm(bias, x_fast, encoder.T).relu_()
        if k_aux < num_dead:
            latents *= latents >= batch.split.kth_largest(latents, k_aux)
        # residual is x̂ − x = −e, so ê − e = latents · decoder + residual
        decoded = batch.split.over_latents((latents @ decoder).to(residual.dtype))
        error = (decoded + residual[rows]) * mask
        by_output = times(error, metric * scale)
        loss += (by_output * error).sum()
        by_output = by_output.mul_(2 * coefficient).to(fast)
        by_latent = (by_output @ decoder.T).mul_(latents > 0)
        by_encoder += by_latent.T @ x_fast
        by_decoder += latents.T @ by_output
        by_bias += by_latent.sum(0, dtype=residual.dtype)
    gradients.encoder.index_add_(0, dead, by_encoder)
    gradients.decoder.index_add_(0, dead, by_decoder)
    gradients.encoder_bias.index_add_(0, dead, by_bias)
    return loss
