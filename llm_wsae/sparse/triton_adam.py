"""Triton kernels of Adam over the weights of latents, the gradients given or made on the way.

A program holds both rows of its latent whole, so that every number is read and written once.

``no_type_check`` keeps the tests' shape checks off functions that are compiled from their source.
"""

from typing import no_type_check

import triton
import triton.language as tl

from llm_wsae.sparse.triton_latents import latent_sums


@triton.jit
@no_type_check
def _adam_row(
    row_ptr,
    gradient,
    mean_ptr,
    square_ptr,
    at,
    inside,
    step_size,
    square_scale,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Moments updated in place; the new row, not stored yet."""
    mean = tl.load(mean_ptr + at, mask=inside, other=0)
    square = tl.load(square_ptr + at, mask=inside, other=0)
    mean += (gradient - mean) * (1 - BETA1)
    square = square * BETA2 + gradient * gradient * (1 - BETA2)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
    row = tl.load(row_ptr + at, mask=inside, other=0)
    return row - step_size * mean / (tl.sqrt(square * square_scale) + EPSILON)


@triton.jit
@no_type_check
def _adam_latent(
    latent,
    by_encoder,
    by_decoder,
    encoder_ptr,  # this and all below [d_sae, d_in]
    decoder_ptr,
    encoder_mean_ptr,
    decoder_mean_ptr,
    encoder_square_ptr,
    decoder_square_ptr,
    encoder_fast_ptr,  # unused unless FAST
    d_in,
    step_size,  # learning rate / (1 - BETA1^step)
    square_scale,  # 1 / (1 - BETA2^step)
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPSILON: tl.constexpr,
    SMALLEST_NORM: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adam over a latent's two rows, the decoder's to norm 1, and a copy of the encoder's."""
    columns = tl.arange(0, BLOCK)
    inside = columns < d_in
    at = latent * d_in + columns
    row = _adam_row(
        encoder_ptr,
        by_encoder,
        encoder_mean_ptr,
        encoder_square_ptr,
        at,
        inside,
        step_size,
        square_scale,
        BETA1,
        BETA2,
        EPSILON,
    )
    tl.store(encoder_ptr + at, row, mask=inside)
    if FAST:
        fast = row.to(tl.float32).to(encoder_fast_ptr.dtype.element_ty)
        tl.store(encoder_fast_ptr + at, fast, mask=inside)
    row = _adam_row(
        decoder_ptr,
        by_decoder,
        decoder_mean_ptr,
        decoder_square_ptr,
        at,
        inside,
        step_size,
        square_scale,
        BETA1,
        BETA2,
        EPSILON,
    )
    norm = tl.sqrt(tl.sum(row * row, 0))
    tl.store(decoder_ptr + at, row / tl.maximum(norm, SMALLEST_NORM), mask=inside)


@triton.jit
@no_type_check
def adam_rows_kernel(
    encoder_gradient_ptr,  # this and all below [d_sae, d_in]
    decoder_gradient_ptr,
    encoder_ptr,
    decoder_ptr,
    encoder_mean_ptr,
    decoder_mean_ptr,
    encoder_square_ptr,
    decoder_square_ptr,
    encoder_fast_ptr,
    d_in,
    step_size,
    square_scale,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPSILON: tl.constexpr,
    SMALLEST_NORM: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One latent whose gradients are given."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < d_in
    at = latent * d_in + columns
    _adam_latent(
        latent,
        tl.load(encoder_gradient_ptr + at, mask=inside, other=0),
        tl.load(decoder_gradient_ptr + at, mask=inside, other=0),
        encoder_ptr,
        decoder_ptr,
        encoder_mean_ptr,
        decoder_mean_ptr,
        encoder_square_ptr,
        decoder_square_ptr,
        encoder_fast_ptr,
        d_in,
        step_size,
        square_scale,
        BETA1,
        BETA2,
        EPSILON,
        SMALLEST_NORM,
        FAST,
        BLOCK,
    )


@triton.jit
@no_type_check
def adam_along_kernel(
    bounds_ptr,
    further_ptr,
    order_ptr,
    rows_ptr,
    by_value_ptr,
    values_ptr,
    x_ptr,
    gradient_ptr,
    further_encoder_ptr,  # [pieces, d_in]
    further_decoder_ptr,  # [pieces, d_in]
    further_bias_ptr,  # [pieces]
    batch,
    d_in,
    span,
    place_ptr,  # [d_sae] which of the rows below is the latent's, or -1; unused unless MORE
    more_encoder_ptr,
    more_decoder_ptr,
    bias_ptr,  # [d_sae]
    encoder_ptr,
    decoder_ptr,
    encoder_mean_ptr,
    decoder_mean_ptr,
    encoder_square_ptr,
    decoder_square_ptr,
    encoder_fast_ptr,
    step_size,
    square_scale,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPSILON: tl.constexpr,
    SMALLEST_NORM: tl.constexpr,
    FAST: tl.constexpr,
    MORE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One latent: its gradients, which go nowhere but into Adam; that by its bias does."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < d_in
    encoder, decoder, bias = latent_sums(
        latent,
        bounds_ptr,
        further_ptr,
        order_ptr,
        rows_ptr,
        by_value_ptr,
        values_ptr,
        x_ptr,
        gradient_ptr,
        further_encoder_ptr,
        further_decoder_ptr,
        further_bias_ptr,
        batch,
        d_in,
        span,
        columns,
        encoder_ptr.dtype.element_ty,
        SLOTS,
        BLOCK,
    )
    tl.store(bias_ptr + latent, bias)
    if MORE:
        place = tl.load(place_ptr + latent)
        if place >= 0:
            at = place * d_in + columns
            encoder += tl.load(more_encoder_ptr + at, mask=inside, other=0)
            decoder += tl.load(more_decoder_ptr + at, mask=inside, other=0)
    _adam_latent(
        latent,
        encoder,
        decoder,
        encoder_ptr,
        decoder_ptr,
        encoder_mean_ptr,
        decoder_mean_ptr,
        encoder_square_ptr,
        decoder_square_ptr,
        encoder_fast_ptr,
        d_in,
        step_size,
        square_scale,
        BETA1,
        BETA2,
        EPSILON,
        SMALLEST_NORM,
        FAST,
        BLOCK,
    )
