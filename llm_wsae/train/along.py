"""The part of a step that all sparse architectures share: from codes to gradients."""

from jaxtyping import Float
from torch import Tensor

from llm_wsae.sparse.codes import RaggedCodes
from llm_wsae.sparse.operations import firing_counts, reconstruct, weight_gradients
from llm_wsae.sparse.reference import Gradients
from llm_wsae.train.parameters import Batch, Parameters, Step, error_weights


def step_along(
    codes: RaggedCodes,
    parameters: Parameters,
    batch: Batch,
    gamma: Float[Tensor, " d_in"],
    push: float | Float[Tensor, ""] = 0.0,
    out: Gradients | None = None,
) -> Step:
    """Loss ‖Γ(x − x̂)‖² (mean over rows and dimensions) of these codes, and its gradients.

    ``push`` is the gradient of a penalty by every active latent; the loss does not count it. The
    weights' gradients sum rows in the number format of the products, and may be written to ``out``.
    """
    encoder, decoder, _, decoder_bias = parameters
    weights = error_weights(batch.mask, gamma)
    made = reconstruct(
        codes, decoder, decoder_bias, batch.x, batch.mask, weights, batch.x_fast.dtype
    )
    by_value = made.by_value
    by_value += push * (codes.values > 0)
    by_encoder, by_decoder, by_bias = weight_gradients(
        codes, batch.x_fast, made.output_gradient, by_value, len(encoder), out
    )
    by_decoder_bias = made.residual.sum(0).mul_(weights)
    gradients = Parameters(by_encoder, by_decoder, by_bias, by_decoder_bias)
    firings = firing_counts(codes, len(encoder))
    return Step(gradients, made.residual, firings, made.row_errors.sum() / 2)


def without_masked(codes: RaggedCodes, batch: Batch) -> RaggedCodes:
    """The codes with the slots of masked rows unused: those rows count nowhere."""
    return codes._replace(values=codes.values * batch.mask[codes.rows()])
