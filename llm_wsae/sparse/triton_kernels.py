"""The Triton kernels behind ``triton``: what runs on the card, one program a row, latent or part.

All sums are in the dtype of what is written (float32, or float64 for float64), whatever the dtype
of what is read. No atomics, and no autotuning: another block shape sums in another order, and a
resumed run must equal an unbroken one bit for bit. Offsets that are products are int64. Rows are
read in tiles of slots × columns, so that many loads are under way at once.

``no_type_check`` keeps the tests' shape checks off functions that are compiled from their source.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _kth_largest(keys, k, BITS: tl.constexpr):
    """The k-th largest of signed integers, found bit by bit from the top; the rest of it is 0."""
    one = tl.full((), 1, keys.dtype)
    lowest = one << (keys.dtype.primitive_bitwidth - 1)  # only the sign bit
    zero = one - one
    kth = tl.where(tl.sum((keys >= zero).to(tl.int32)) >= k, zero, lowest)
    for step in range(2, BITS + 1):
        higher = kth + (one << (keys.dtype.primitive_bitwidth - step))
        kth = tl.where(tl.sum((keys >= higher).to(tl.int32)) >= k, higher, kth)
    return kth


@triton.jit
@no_type_check
def select_kernel(
    values_ptr,  # [rows, width]
    numbers_ptr,  # [rows, width] latent numbers of the values; unused unless NUMBERED
    best_ptr,  # [rows, parts, k]
    chosen_ptr,  # [rows, parts, k]
    width,
    part_width,
    k,  # at most part_width
    NUMBERED: tl.constexpr,
    CLIP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The k largest entries of one part of one row, in order of position; first ones where tied.

    A part stays in registers while the k-th largest is found. Floats are compared as integers of
    the same order, of which bfloat16 needs only 16 bits; NaN is the largest, so that it is seen.
    Positions beyond the row count as -inf and come last, so they are chosen only in a part with
    fewer than k entries, and never from among the candidates of all parts.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    columns = part * part_width + lanes
    inside = (lanes < part_width) & (columns < width)
    values = tl.load(values_ptr + row * width + columns, mask=inside, other=-float("inf"))
    if values.dtype == tl.float64:
        bits = values.to(tl.int64, bitcast=True)
        keys = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        keys = tl.where(values != values, 0x7FFFFFFFFFFFFFFF, keys)
    else:
        values = values.to(tl.float32)
        bits = values.to(tl.int32, bitcast=True)
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        keys = tl.where(values != values, 0x7FFFFFFF, keys)
        keys = (keys >> (32 - BITS)) << (32 - BITS)
    kth = _kth_largest(keys, k, BITS)
    above = keys > kth
    tied = (keys == kth).to(tl.int32)
    kept = above | ((tied > 0) & (tl.cumsum(tied, 0) <= k - tl.sum(above.to(tl.int32))))
    slots = (row * tl.num_programs(1) + part) * k + tl.cumsum(kept.to(tl.int32), 0) - 1
    if NUMBERED:
        columns = tl.load(numbers_ptr + row * width + columns, mask=kept & inside, other=0)
    if CLIP:
        values = tl.where(values < 0, 0.0, values)
    tl.store(chosen_ptr + slots, columns, mask=kept)
    tl.store(best_ptr + slots, values, mask=kept)


@triton.jit
@no_type_check
def above_kernel(
    pre_ptr,  # [rows, width]
    threshold_ptr,  # [width]
    starts_ptr,  # [rows + 1] where each row's slots begin
    indices_ptr,
    values_ptr,
    counts_ptr,  # [rows]
    width,
    BLOCK: tl.constexpr,
):
    """Entries of one row above their thresholds into its slots, as many as fit; and how many are.

    Counted in full even where they don't fit, so that the caller learns what room they need.
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(starts_ptr + row)
    room = tl.load(starts_ptr + row + 1) - start
    lanes = tl.arange(0, BLOCK)
    found = tl.zeros((), tl.int32)
    for left in range(0, width, BLOCK):
        columns = left + lanes
        inside = columns < width
        threshold = tl.load(threshold_ptr + columns, mask=inside, other=0)
        pre = tl.load(pre_ptr + row * width + columns, mask=inside, other=0).to(threshold.dtype)
        active = inside & (pre > threshold)
        slots = found + tl.cumsum(active.to(tl.int32), 0) - 1
        fits = active & (slots < room)
        tl.store(indices_ptr + start + slots, columns, mask=fits)
        tl.store(values_ptr + start + slots, pre, mask=fits)
        found += tl.sum(active.to(tl.int32))
    tl.store(counts_ptr + row, found)


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
        at = rows[:, None] * d_in + columns[None, :]
        read = used[:, None] & inside[None, :]
        x = tl.load(x_ptr + at, mask=read, other=0).to(exact)
        gradient = tl.load(gradient_ptr + at, mask=read, other=0).to(exact)
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
