"""Triton kernels that read and write whole rows of the encoder, the decoder or the batch.

All sums are in the dtype of what is written (float32, or float64 for float64), whatever the dtype
of what is read. No atomics, and no tuning at run time: another block shape sums in another order,
and a resumed run must equal an unbroken one bit for bit. Offsets that are products are int64. Rows
are read in tiles of slots × columns, so that many loads are under way at once.

``no_type_check`` keeps the tests' shape checks off functions that are compiled from their source.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def decode_kernel(
    indices_ptr,  # [active]
    values_ptr,  # [active]
    offsets_ptr,  # [rows + 1]
    decoder_ptr,  # [d_sae, d_in]
    bias_ptr,  # [d_in]
    out_ptr,  # [rows, d_in]
    d_in,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some columns of one row: Σ value · decoder[index] + bias. Unused slots are not read."""
    exact = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d_in
    end = tl.load(offsets_ptr + row + 1)
    total = tl.zeros((BLOCK,), exact)
    for first in range(tl.load(offsets_ptr + row), end, SLOTS):
        slots = first + tl.arange(0, SLOTS)
        values = tl.load(values_ptr + slots, mask=slots < end, other=0).to(exact)
        used = values != 0
        latents = tl.load(indices_ptr + slots, mask=used, other=0)
        tile = tl.load(
            decoder_ptr + latents[:, None] * d_in + columns[None, :],
            mask=used[:, None] & inside[None, :],
            other=0,
        )
        total += tl.sum(tile.to(exact) * values[:, None], 0)
    total += tl.load(bias_ptr + columns, mask=inside, other=0).to(exact)
    tl.store(out_ptr + row * d_in + columns, total, mask=inside)


@triton.jit
@no_type_check
def value_gradients_kernel(
    indices_ptr,  # [active]
    values_ptr,  # [active]
    offsets_ptr,  # [rows + 1]
    decoder_ptr,  # [d_sae, d_in]
    gradient_ptr,  # [rows, d_in]
    out_ptr,  # [active]
    d_in,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All slots of one row: decoder[index] · output gradient where the value is above 0, else 0."""
    exact = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(offsets_ptr + row + 1)
    for first in range(tl.load(offsets_ptr + row), end, SLOTS):
        slots = first + tl.arange(0, SLOTS)
        used = tl.load(values_ptr + slots, mask=slots < end, other=0) > 0
        latents = tl.load(indices_ptr + slots, mask=used, other=0)
        products = tl.zeros((SLOTS, BLOCK), exact)
        for left in range(0, d_in, BLOCK):
            columns = left + tl.arange(0, BLOCK)
            inside = columns < d_in
            gradient = tl.load(gradient_ptr + row * d_in + columns, mask=inside, other=0)
            tile = tl.load(
                decoder_ptr + latents[:, None] * d_in + columns[None, :],
                mask=used[:, None] & inside[None, :],
                other=0,
            )
            products += tile.to(exact) * gradient.to(exact)[None, :]
        tl.store(out_ptr + slots, tl.sum(products, 1), mask=slots < end)


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
def latent_sums_kernel(
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
    encoder_ptr,  # [d_sae, d_in]
    decoder_ptr,  # [d_sae, d_in]
    bias_ptr,  # [d_sae]
    batch,
    d_in,
    span,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some columns of one latent's gradients: its first occurrences, then its further pieces."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
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
        encoder_ptr.dtype.element_ty,
        SLOTS,
        BLOCK,
    )
    for piece in range(tl.load(further_ptr + latent), tl.load(further_ptr + latent + 1)):
        encoder += tl.load(further_encoder_ptr + piece * d_in + columns, mask=inside, other=0)
        decoder += tl.load(further_decoder_ptr + piece * d_in + columns, mask=inside, other=0)
        bias += tl.load(further_bias_ptr + piece)
    tl.store(encoder_ptr + latent * d_in + columns, encoder, mask=inside)
    tl.store(decoder_ptr + latent * d_in + columns, decoder, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(bias_ptr + latent, bias)


@triton.jit
@no_type_check
def _adam_row(
    row_ptr,
    gradient_ptr,
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
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0)
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
def adam_rows_kernel(
    encoder_ptr,  # this and all below [d_sae, d_in]
    decoder_ptr,
    encoder_gradient_ptr,
    decoder_gradient_ptr,
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
    """One latent: Adam over its two rows, the decoder's to norm 1, a copy of the encoder's.

    Both rows are held whole, so that each number is read and written once.
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < d_in
    at = tl.program_id(0).to(tl.int64) * d_in + columns
    row = _adam_row(
        encoder_ptr,
        encoder_gradient_ptr,
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
        decoder_gradient_ptr,
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
