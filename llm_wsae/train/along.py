"""The part of a step that all sparse architectures share: from codes to gradients."""

from jaxtyping import Float
from torch import Tensor

from llm_wsae.sparse.codes import RaggedCodes
from llm_wsae.sparse.operations import decode, firing_counts, value_gradients, weight_gradients
from llm_wsae.train.parameters import Batch, Parameters, Step, weighted_error


def step_along(
    codes: RaggedCodes,
    parameters: Parameters,
    batch: Batch,
    gamma: Float[Tensor, " d_in"],
    push: float | Float[Tensor, ""] = 0.0,
) -> Step:
    """Loss ‖Γ(x − x̂)‖² (mean over rows and dimensions) of these codes, and its gradients.

    ``push`` is the gradient of a penalty by every active latent; the loss does not count it.
    """
    encoder, decoder, _, decoder_bias = parameters
    d_sae = len(encoder)
    residual = decode(codes, decoder, decoder_bias).sub_(batch.x).mul_(batch.mask[:, None])
    loss, output_gradient = weighted_error(residual, batch.mask, gamma)
    by_value = value_gradients(codes, decoder, output_gradient)
    by_value += push * (codes.values > 0)
    by_encoder, by_decoder, by_bias = weight_gradients(
        codes, batch.x, output_gradient, by_value, d_sae
    )
    gradients = Parameters(by_encoder, by_decoder, by_bias, output_gradient.sum(0))
    return Step(gradients, residual, firing_counts(codes, d_sae), loss)


def without_masked(codes: RaggedCodes, batch: Batch) -> RaggedCodes:
    """The codes with the slots of masked rows unused: those rows count nowhere."""
    return codes._replace(values=codes.values * batch.mask[codes.rows()])
