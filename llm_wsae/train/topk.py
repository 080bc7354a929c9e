"""TopK (Gao et al. 2024): the k largest latents of every row reconstruct it.

Gradients by hand along the sparse codes: after the encoder's matrix product nothing of size
batch × d_sae exists. γ enters through the residual's gradient only.
"""

from jaxtyping import Float
from torch import Tensor

from llm_wsae.sparse.codes import ragged
from llm_wsae.sparse.operations import (
    decode,
    encode_topk,
    firing_counts,
    value_gradients,
    weight_gradients,
)
from llm_wsae.train.parameters import Batch, Parameters, Step, weighted_error


def topk_step(parameters: Parameters, batch: Batch, gamma: Float[Tensor, " d_in"], k: int) -> Step:
    """Loss ‖Γ(x − x̂)‖² (mean over rows and dimensions) and its gradients."""
    encoder, decoder, encoder_bias, decoder_bias = parameters
    d_sae, fast = len(encoder), batch.x_fast.dtype
    codes = ragged(encode_topk(batch.x_fast, encoder.to(fast), encoder_bias.to(fast), k))
    residual = decode(codes, decoder, decoder_bias).sub_(batch.x).mul_(batch.mask[:, None])
    loss, output_gradient = weighted_error(residual, batch.mask, gamma)
    by_value = value_gradients(codes, decoder, output_gradient)
    by_encoder, by_decoder, by_bias = weight_gradients(
        codes, batch.x, output_gradient, by_value, d_sae
    )
    gradients = Parameters(by_encoder, by_decoder, by_bias, output_gradient.sum(0))
    return Step(gradients, residual, firing_counts(codes, d_sae), loss)
