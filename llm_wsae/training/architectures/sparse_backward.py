"""The part of a step that all sparse architectures share: from codes to gradients."""

from jaxtyping import Float
from torch import Tensor

from llm_wsae.sparse.codes import RaggedCodes, Reconstruction, SparseGradients
from llm_wsae.sparse.operations import exact_values, firing_counts, reconstruct, value_gradients
from llm_wsae.training.parameters import Batch, Parameters, Step, error_weights, times
from llm_wsae.weights.loss_weights import Gamma


def step_along(
    codes: RaggedCodes,
    parameters: Parameters,
    batch: Batch,
    gamma: Gamma,
    push: float | Float[Tensor, ""] = 0.0,
) -> Step:
    """Loss ‖Γ(x − x̂)‖² (mean over rows and dimensions) of these codes, and its gradients.

    ``push`` is the gradient of a penalty by every active latent; the loss does not count it. The
    weights' gradients sum rows in the number format of the products.
    """
    encoder, decoder, _, decoder_bias = parameters
    weights = error_weights(batch.num_rows, gamma)
    if weights.ndim == 1 and batch.split.latent_parts == 1:
        made = reconstruct(
            codes, decoder, decoder_bias, batch.x, batch.mask, weights, batch.x_fast.dtype
        )
    else:
        made = _reconstruct_in_turn(codes, parameters, batch, weights)
    total = made.residual.sum(0)
    if batch.row_weights is not None:
        total = batch.row_weights @ made.residual
        made = _rows_weighed(made, codes, batch.row_weights)
    by_value = made.by_value
    by_value += push * (codes.values > 0)
    terms = SparseGradients(codes, batch.x_fast, made.output_gradient, by_value)
    firings = firing_counts(codes, len(encoder))
    return Step(terms, times(total, weights), made.residual, firings, made.row_errors.sum() / 2)


def _reconstruct_in_turn(
    codes: RaggedCodes, parameters: Parameters, batch: Batch, weights: Gamma
) -> Reconstruction:
    """``operations.reconstruct`` where something comes in between: a product with a full matrix, or
    what the latents of other processes add."""
    _, decoder, _, decoder_bias = parameters
    residual = (
        batch.split.decode(codes, decoder, decoder_bias).sub_(batch.x).mul_(batch.mask[:, None])
    )
    gradient = times(residual, weights)
    by_value = value_gradients(codes, decoder, gradient)
    errors = (residual * gradient).sum(1)
    return Reconstruction(residual, gradient.to(batch.x_fast.dtype), by_value, errors)


def _rows_weighed(
    made: Reconstruction, codes: RaggedCodes, row_weights: Float[Tensor, " batch"]
) -> Reconstruction:
    """Every row's part of the loss times its weight; the residual stays as it is."""
    return Reconstruction(
        made.residual,
        made.output_gradient.mul_(row_weights[:, None]),
        made.by_value.mul_(row_weights[codes.rows()]),
        made.row_errors * row_weights,
    )


def exact(codes: RaggedCodes, parameters: Parameters, batch: Batch) -> RaggedCodes:
    """The codes with values summed in float32, not rounded by the product that picked them.

    Their error comes back several times as large in the encoder's gradient: what a reconstruction
    leaves of a row is small beside them. The encoder may still be the rounded one, to read half.
    """
    if batch.x_fast.dtype == batch.x.dtype:
        return codes
    return exact_values(codes, batch.x, parameters.encoder, parameters.encoder_bias)


def without_masked(codes: RaggedCodes, batch: Batch) -> RaggedCodes:
    """The codes with the slots of masked rows unused: those rows count nowhere."""
    return codes._replace(values=codes.values * batch.mask[codes.rows()])
