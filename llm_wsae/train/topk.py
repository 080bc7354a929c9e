"""TopK (Gao et al. 2024): the k largest latents of every row reconstruct it.

Gradients by hand along the sparse codes: after the encoder's matrix product nothing of size
batch × d_sae exists. γ enters through the residual's gradient only.
"""

from jaxtyping import Float
from torch import Tensor

from llm_wsae.sparse.operations import (
    LatentGroups,
    decode,
    encode_topk,
    latent_totals,
    value_gradients,
)
from llm_wsae.train.parameters import Batch, Parameters, Step, weighted_error


def topk_step(parameters: Parameters, batch: Batch, gamma: Float[Tensor, " d_in"], k: int) -> Step:
    """Loss ‖Γ(x − x̂)‖² (mean over rows and dimensions) and its gradients."""
    encoder, decoder, encoder_bias, decoder_bias = parameters
    d_sae, fast = len(encoder), batch.x_fast.dtype
    codes = encode_topk(batch.x_fast, encoder.to(fast), encoder_bias.to(fast), k)
    residual = decode(codes, decoder, decoder_bias).sub_(batch.x).mul_(batch.mask[:, None])
    loss, output_gradient = weighted_error(residual, batch.mask, gamma)
    by_value = value_gradients(codes, decoder, output_gradient)
    groups = LatentGroups(codes, d_sae)
    gradients = Parameters(
        groups.sums(batch.x, by_value),
        groups.sums(output_gradient, codes.values),
        latent_totals(codes.indices, by_value, d_sae),
        output_gradient.sum(0),
    )
    fired = (codes.values > 0).to(codes.values.dtype)
    return Step(gradients, residual, latent_totals(codes.indices, fired, d_sae), loss)
