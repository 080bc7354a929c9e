"""Triton kernels over latents: the gradients of their weights, summed over their occurrences.

As in ``triton_rows``, one program owns what it writes and results are the same every time. What a
latent that occurs often has beyond its first occurrences is summed in pieces before.

``no_type_check`` keeps the tests' shape checks off functions that are compiled from their source.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _occurrence_sums(
    begin,
    end,
    order_ptr,
    rows_ptr,
    by_value_ptr,
    values_ptr,
    x_ptr,
    gradient_ptr,
    batch,  # rows of x: row i of the gradients belongs to row i mod batch
    d_in,
    columns,
    exact: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ by_value·x[row], Σ value·gradient[row] and Σ by_value over sorted occurrences."""
    inside = columns < d_in
    encoder = tl.zeros((BLOCK,), exact)
    decoder = tl.zeros((BLOCK,), exact)
    bias = tl.zeros((SLOTS,), exact)
    for first in range(begin, end, SLOTS):
        places = first + tl.arange(0, SLOTS)
        slots = tl.load(order_ptr + places, mask=places < end, other=0)
        by_value = tl.load(by_value_ptr + slots, mask=places < end, other=0).to(exact)
        values = tl.load(values_ptr + slots, mask=places < end, other=0).to(exact)
        used = (by_value != 0) | (values != 0)
        rows = tl.load(rows_ptr + slots, mask=used, other=0).to(tl.int64)
        read = used[:, None] & inside[None, :]
        at = rows[:, None] * d_in + columns[None, :]
        gradient = tl.load(gradient_ptr + at, mask=read, other=0).to(exact)
        at = (rows % batch)[:, None] * d_in + columns[None, :]
        x = tl.load(x_ptr + at, mask=read, other=0).to(exact)
        encoder += tl.sum(x * by_value[:, None], 0)
        decoder += tl.sum(gradient * values[:, None], 0)
        bias += by_value
    return encoder, decoder, tl.sum(bias, 0)


@triton.jit
@no_type_check
def further_sums_kernel(
    bounds_ptr,  # [d_sae + 1] where each latent's occurrences begin
    further_ptr,  # [d_sae + 1] where each latent's further pieces begin
    latents_ptr,  # [pieces] whose piece it is; d_sae where there is none
    order_ptr,
    rows_ptr,
    by_value_ptr,
    values_ptr,
    x_ptr,
    gradient_ptr,
    encoder_ptr,  # [pieces, d_in]
    decoder_ptr,  # [pieces, d_in]
    bias_ptr,  # [pieces]
    batch,
    d_in,
    d_sae,
    span,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One further piece: up to ``span`` occurrences of a latent that has more than ``span``."""
    piece = tl.program_id(0).to(tl.int64)
    latent = tl.load(latents_ptr + piece)
    if latent < d_sae:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        number = 1 + piece - tl.load(further_ptr + latent)  # within its latent
        begin = tl.load(bounds_ptr + latent) + number * span
        end = tl.minimum(begin + span, tl.load(bounds_ptr + latent + 1))
        encoder, decoder, bias = _occurrence_sums(
            begin,
            end,
            order_ptr,
            rows_ptr,
            by_value_ptr,
            values_ptr,
            x_ptr,
            gradient_ptr,
            batch,
            d_in,
            columns,
            encoder_ptr.dtype.element_ty,
            SLOTS,
            BLOCK,
        )
        tl.store(encoder_ptr + piece * d_in + columns, encoder, mask=columns < d_in)
        tl.store(decoder_ptr + piece * d_in + columns, decoder, mask=columns < d_in)
        if tl.program_id(1) == 0:
            tl.store(bias_ptr + piece, bias)


@triton.jit
@no_type_check
def latent_sums(
    latent,
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
    columns,
    exact: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some columns of one latent's gradients: its first occurrences, then its further pieces."""
    inside = columns < d_in
    begin = tl.load(bounds_ptr + latent)
    end = tl.minimum(begin + span, tl.load(bounds_ptr + latent + 1))
    encoder, decoder, bias = _occurrence_sums(
        begin,
        end,
        order_ptr,
        rows_ptr,
        by_value_ptr,
        values_ptr,
        x_ptr,
        gradient_ptr,
        batch,
        d_in,
        columns,
        exact,
        SLOTS,
        BLOCK,
    )
    for piece in range(tl.load(further_ptr + latent), tl.load(further_ptr + latent + 1)):
        encoder += tl.load(further_encoder_ptr + piece * d_in + columns, mask=inside, other=0)
        decoder += tl.load(further_decoder_ptr + piece * d_in + columns, mask=inside, other=0)
        bias += tl.load(further_bias_ptr + piece)
    return encoder, decoder, bias


@triton.jit
@no_type_check
def latent_sums_kernel(
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
    encoder_ptr,  # [d_sae, d_in]
    decoder_ptr,  # [d_sae, d_in]
    bias_ptr,  # [d_sae]
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some columns of one latent's gradients, to memory."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
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
    tl.store(encoder_ptr + latent * d_in + columns, encoder, mask=inside)
    tl.store(decoder_ptr + latent * d_in + columns, decoder, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(bias_ptr + latent, bias)
