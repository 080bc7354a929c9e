"""TopK (Gao et al. 2024): the k largest latents of every row reconstruct it.

Gradients by hand along the sparse codes: after the encoder's matrix product nothing of size
batch × d_sae exists. γ enters through the residual's gradient only.
"""

from llm_wsae.sparse.operations import encode_topk
from llm_wsae.training.architectures.sparse_backward import exact, step_along
from llm_wsae.training.parameters import Batch, Parameters, Step
from llm_wsae.weights.loss_weights import Gamma


def topk_step(parameters: Parameters, batch: Batch, gamma: Gamma, k: int) -> Step:
    """Loss ‖Γ(x − x̂)‖² (mean over rows and dimensions) and its gradients."""
    fast = batch.x_fast.dtype
    encoder, bias = parameters.encoder.to(fast), parameters.encoder_bias.to(fast)
    codes = encode_topk(batch.x_fast, encoder, bias, min(k, len(encoder)))
    kept = codes._replace(values=codes.values * batch.mask[:, None])  # masked rows count nowhere
    active = exact(batch.split.topk(kept, k), parameters, batch)
    return step_along(active, parameters, batch, gamma)
