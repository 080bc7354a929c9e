"""The Triton kernels of ``triton.py``.

Nothing is tuned at run time, ties have a rule, and one program owns what it writes, so that results
are the same every time. Offsets that are products are int64. Rows are read in tiles of
slots × columns, so that many loads are under way at once.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from llm_wsae.sparse import codes

_KEEP_MEAN, _KEEP_SQUARE = (tl.constexpr(beta) for beta in codes.BETAS)
_EPSILON = tl.constexpr(codes.EPSILON)
_SMALLEST_NORM = tl.constexpr(codes.SMALLEST_NORM)

# --- The largest entries of a row, or all above a threshold


@triton.jit
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
def select_kernel(
    values_ptr,  # [rows, width]
    best_ptr,  # [rows, parts, k]
    chosen_ptr,  # [rows, parts, k]
    width,
    part_width,
    k,  # at most part_width
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The k largest entries of one part of one row, in order of position; first ones where tied.

    Floats are compared as integers of the same order; NaN is the largest, so that it is seen.
    Positions beyond the row count as -inf and come last, so they are chosen only in a part with
    fewer than k entries, and never from among the candidates of all parts.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    columns = part * part_width + lanes
    inside = (lanes < part_width) & (columns < width)
    at = row * width + columns
    values = tl.load(values_ptr + at, mask=inside, other=-float("inf"))
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
    tl.store(chosen_ptr + slots, columns, mask=kept)
    # read anew: in registers only the keys were kept
    values = tl.load(values_ptr + at, mask=kept & inside, other=-float("inf"))
    tl.store(best_ptr + slots, values.to(best_ptr.dtype.element_ty), mask=kept)


@triton.jit
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
    """Entries of one row above their thresholds into its slots, as many as fit; and how many are,
    also where they do not fit."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(starts_ptr + row)
    capacity = tl.load(starts_ptr + row + 1) - start
    lanes = tl.arange(0, BLOCK)
    found = tl.zeros((), tl.int32)
    for left in range(0, width, BLOCK):
        columns = left + lanes
        inside = columns < width
        threshold = tl.load(threshold_ptr + columns, mask=inside, other=0)
        pre = tl.load(pre_ptr + row * width + columns, mask=inside, other=0).to(threshold.dtype)
        active = inside & (pre > threshold)
        slots = found + tl.cumsum(active.to(tl.int32), 0) - 1
        fits = active & (slots < capacity)
        tl.store(indices_ptr + start + slots, columns, mask=fits)
        tl.store(values_ptr + start + slots, pre, mask=fits)
        found += tl.sum(active.to(tl.int32))
    tl.store(counts_ptr + row, found)


@triton.jit
def _activations(pre_ptr, dead_ptr, columns, width, MASKED: tl.constexpr):
    """Pre-activations of one row, 0 where negative or where their latent is not dead."""
    inside = columns < width
    active = tl.load(pre_ptr + columns, mask=inside, other=0)
    active = tl.where(active <= 0, 0.0, active).to(active.dtype)
    if MASKED:
        dead = tl.load(dead_ptr + columns, mask=inside, other=0)
        active = tl.where(dead != 0, active, 0.0).to(active.dtype)
    return active


@triton.jit
def activate_dead_kernel(
    pre_ptr,  # [rows, width], changed in place
    dead_ptr,  # [width]; unused unless MASKED
    width,
    k,
    MASKED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Activations of one row, 0 where they are below the k-th largest, which is found bit by bit
    from the top; the row is read anew for every bit, from the cache."""
    pre_ptr += tl.program_id(0).to(tl.int64) * width
    wide: tl.constexpr = tl.float64 if BITS == 64 else tl.float32
    whole: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    size: tl.constexpr = whole.primitive_bitwidth
    lanes = tl.arange(0, BLOCK)
    kth = tl.zeros((), whole)
    for step in range(2, BITS + 1):
        higher = kth + (tl.full((), 1, whole) << (size - step))
        found = tl.zeros((), tl.int32)
        for left in range(0, width, BLOCK):
            active = _activations(pre_ptr, dead_ptr, left + lanes, width, MASKED)
            keys = active.to(wide).to(whole, bitcast=True)
            found += tl.sum((keys >= higher).to(tl.int32))
        kth = tl.where(found >= k, higher, kth)
    for left in range(0, width, BLOCK):
        columns = left + lanes
        active = _activations(pre_ptr, dead_ptr, columns, width, MASKED)
        keys = active.to(wide).to(whole, bitcast=True)
        active = tl.where(keys >= kth, active, 0.0).to(active.dtype)
        tl.store(pre_ptr + columns, active, mask=columns < width)


# --- Sums along sparse codes: over the rows of a batch, and over the occurrences of a latent


@triton.jit
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
def reconstruct_kernel(
    indices_ptr,  # [active]
    values_ptr,  # [active]
    offsets_ptr,  # [rows + 1]
    decoder_ptr,  # [d_sae, d_in]
    bias_ptr,  # [d_in]
    x_ptr,  # [rows, d_in]
    row_weights_ptr,  # [rows]
    column_weights_ptr,  # [d_in]
    residual_ptr,  # [rows, d_in]
    gradient_ptr,  # [rows, d_in], in its own dtype
    by_value_ptr,  # [active]
    row_errors_ptr,  # [rows]
    d_in,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row whole: decode it, weigh what is left, and the gradients by its values from that."""
    exact = residual_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < d_in
    begin, end = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    left = tl.load(bias_ptr + columns, mask=inside, other=0).to(exact)
    for first in range(begin, end, SLOTS):
        slots = first + tl.arange(0, SLOTS)
        values = tl.load(values_ptr + slots, mask=slots < end, other=0).to(exact)
        used = values != 0
        latents = tl.load(indices_ptr + slots, mask=used, other=0)
        entries = latents[:, None] * d_in + columns[None, :]
        tile = tl.load(decoder_ptr + entries, mask=used[:, None] & inside[None, :], other=0)
        left += tl.sum(tile.to(exact) * values[:, None], 0)
    at = row * d_in + columns
    left -= tl.load(x_ptr + at, mask=inside, other=0).to(exact)
    left *= tl.load(row_weights_ptr + row).to(exact)
    gradient = left * tl.load(column_weights_ptr + columns, mask=inside, other=0).to(exact)
    tl.store(residual_ptr + at, left, mask=inside)
    tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
    tl.store(row_errors_ptr + row, tl.sum(left * gradient, 0))
    for first in range(begin, end, SLOTS):
        slots = first + tl.arange(0, SLOTS)
        used = tl.load(values_ptr + slots, mask=slots < end, other=0) > 0
        latents = tl.load(indices_ptr + slots, mask=used, other=0)
        entries = latents[:, None] * d_in + columns[None, :]
        tile = tl.load(decoder_ptr + entries, mask=used[:, None] & inside[None, :], other=0)
        products = tl.sum(tile.to(exact) * gradient[None, :], 1)
        tl.store(by_value_ptr + slots, products, mask=slots < end)


class Occurrences(NamedTuple):
    """``codes.SparseGradients`` grouped by latent; pointers in the kernels."""

    bounds: Tensor
    """[d_sae + 1] where each latent's occurrences begin."""
    further: Tensor
    """[d_sae + 1] where each latent's further pieces begin."""
    order: Tensor
    """[slots] in order of latents."""
    rows: Tensor
    """[slots] each one's row."""
    by_value: Tensor
    """[slots] the gradient by each value."""
    activations: Tensor
    """[slots] the values of the codes; Triton's tuples have a ``values`` of their own."""
    x: Tensor
    """[batch, d_in]"""
    output_gradient: Tensor
    """[batches, d_in]; row i belongs to row i mod batch of x."""
    batch: int
    d_in: int
    span: int
    """Occurrences in a piece."""


class Sums(NamedTuple):
    """Gradients by encoder, decoder and encoder bias, of latents or of pieces of them."""

    encoder: Tensor
    decoder: Tensor
    bias: Tensor


@triton.jit
def _sums_between(
    occurrences, begin, end, columns, exact: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Σ by_value·x[row], Σ value·gradient[row] and Σ by_value over sorted occurrences."""
    inside = columns < occurrences.d_in
    encoder = tl.zeros((BLOCK,), exact)
    decoder = tl.zeros((BLOCK,), exact)
    bias = tl.zeros((SLOTS,), exact)
    for first in range(begin, end, SLOTS):
        places = first + tl.arange(0, SLOTS)
        slots = tl.load(occurrences.order + places, mask=places < end, other=0)
        by_value = tl.load(occurrences.by_value + slots, mask=places < end, other=0).to(exact)
        values = tl.load(occurrences.activations + slots, mask=places < end, other=0).to(exact)
        used = (by_value != 0) | (values != 0)
        rows = tl.load(occurrences.rows + slots, mask=used, other=0).to(tl.int64)
        read = used[:, None] & inside[None, :]
        at = rows[:, None] * occurrences.d_in + columns[None, :]
        gradient = tl.load(occurrences.output_gradient + at, mask=read, other=0).to(exact)
        at = (rows % occurrences.batch)[:, None] * occurrences.d_in + columns[None, :]
        x = tl.load(occurrences.x + at, mask=read, other=0).to(exact)
        encoder += tl.sum(x * by_value[:, None], 0)
        decoder += tl.sum(gradient * values[:, None], 0)
        bias += by_value
    return encoder, decoder, tl.sum(bias, 0)


@triton.jit
def further_sums_kernel(
    occurrences,
    owners_ptr,  # [pieces] the latent whose piece it is; d_sae where there is none
    pieces,
    d_sae,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One further piece: up to ``span`` occurrences of a latent that has more than ``span``."""
    piece = tl.program_id(0).to(tl.int64)
    latent = tl.load(owners_ptr + piece)
    if latent < d_sae:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < occurrences.d_in
        number = 1 + piece - tl.load(occurrences.further + latent)  # within its latent
        begin = tl.load(occurrences.bounds + latent) + number * occurrences.span
        end = tl.minimum(begin + occurrences.span, tl.load(occurrences.bounds + latent + 1))
        exact: tl.constexpr = pieces.encoder.dtype.element_ty
        encoder, decoder, bias = _sums_between(
            occurrences, begin, end, columns, exact, SLOTS, BLOCK
        )
        tl.store(pieces.encoder + piece * occurrences.d_in + columns, encoder, mask=inside)
        tl.store(pieces.decoder + piece * occurrences.d_in + columns, decoder, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(pieces.bias + piece, bias)


@triton.jit
def latent_sums(occurrences, pieces, latent, columns, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Some columns of one latent's gradients: its first occurrences, then its further pieces."""
    inside = columns < occurrences.d_in
    begin = tl.load(occurrences.bounds + latent)
    end = tl.minimum(begin + occurrences.span, tl.load(occurrences.bounds + latent + 1))
    exact: tl.constexpr = pieces.encoder.dtype.element_ty
    encoder, decoder, bias = _sums_between(occurrences, begin, end, columns, exact, SLOTS, BLOCK)
    for piece in range(
        tl.load(occurrences.further + latent), tl.load(occurrences.further + latent + 1)
    ):
        at = piece * occurrences.d_in + columns
        encoder += tl.load(pieces.encoder + at, mask=inside, other=0)
        decoder += tl.load(pieces.decoder + at, mask=inside, other=0)
        bias += tl.load(pieces.bias + piece)
    return encoder, decoder, bias


@triton.jit
def latent_sums_kernel(occurrences, pieces, out, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Some columns of one latent's gradients, to memory."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < occurrences.d_in
    encoder, decoder, bias = latent_sums(occurrences, pieces, latent, columns, SLOTS, BLOCK)
    tl.store(out.encoder + latent * occurrences.d_in + columns, encoder, mask=inside)
    tl.store(out.decoder + latent * occurrences.d_in + columns, decoder, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(out.bias + latent, bias)


# --- Adam, the gradients given or made on the way; a program holds both rows of its latent whole


class Rate(NamedTuple):
    """Of this step."""

    step_size: float
    """Learning rate / (1 - beta1^step)."""
    square_scale: float
    """1 / (1 - beta2^step)."""


@triton.jit
def _adam_row(row_ptr, mean_ptr, square_ptr, gradient, at, inside, rate, scale):
    """Moments updated in place; the new row, of one that is ``scale`` times what is stored; not
    stored yet."""
    mean = tl.load(mean_ptr + at, mask=inside, other=0)
    square = tl.load(square_ptr + at, mask=inside, other=0)
    mean += (gradient - mean) * (1 - _KEEP_MEAN)
    square = square * _KEEP_SQUARE + gradient * gradient * (1 - _KEEP_SQUARE)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
    row = scale * tl.load(row_ptr + at, mask=inside, other=0)
    return row - rate.step_size * mean / (tl.sqrt(square * rate.square_scale) + _EPSILON)


@triton.jit
def _store_encoder(state, row, at, inside):
    tl.store(state.encoder + at, row, mask=inside)
    if state.encoder_fast is not None:
        fast = row.to(tl.float32).to(state.encoder_fast.dtype.element_ty)
        tl.store(state.encoder_fast + at, fast, mask=inside)


@triton.jit
def _adam_raw_latent(state, raw, by_encoder, by_decoder, by_bias, latent, at, inside, rate):
    """The same over the raw rows length · decoder and encoder / length, which leave the decoder's
    at norm 1; the new length is the raw one's."""
    length = tl.load(raw.lengths + latent)
    encoder = tl.load(state.encoder + at, mask=inside, other=0)
    decoder = tl.load(state.decoder + at, mask=inside, other=0)
    by_length = by_bias * tl.load(raw.bias + latent)
    by_length += tl.sum(by_encoder * encoder - by_decoder * decoder, 0)
    gradient = (by_decoder + by_length * decoder) / length
    row = _adam_row(
        state.decoder, state.decoder_mean, state.decoder_square, gradient, at, inside, rate, length
    )
    now = tl.maximum(tl.sqrt(tl.sum(row * row, 0)), _SMALLEST_NORM)
    tl.store(state.decoder + at, row / now, mask=inside)
    tl.store(raw.lengths + latent, now)
    gradient = by_encoder * length
    mean, square = state.encoder_mean, state.encoder_square
    row = _adam_row(state.encoder, mean, square, gradient, at, inside, rate, 1 / length)
    _store_encoder(state, now * row, at, inside)


@triton.jit
def _adam_latent(state, by_encoder, by_decoder, at, inside, rate):
    """Adam over a latent's two rows, the decoder's to norm 1, and a copy of the encoder's."""
    row = _adam_row(
        state.encoder, state.encoder_mean, state.encoder_square, by_encoder, at, inside, rate, 1.0
    )
    _store_encoder(state, row, at, inside)
    row = _adam_row(
        state.decoder, state.decoder_mean, state.decoder_square, by_decoder, at, inside, rate, 1.0
    )
    norm = tl.sqrt(tl.sum(row * row, 0))
    tl.store(state.decoder + at, row / tl.maximum(norm, _SMALLEST_NORM), mask=inside)


@triton.jit
def adam_kernel(gradients, state, rate, d_in, BLOCK: tl.constexpr):
    """One latent whose gradients (encoder's, decoder's) are given."""
    columns = tl.arange(0, BLOCK)
    inside = columns < d_in
    at = tl.program_id(0).to(tl.int64) * d_in + columns
    by_encoder = tl.load(gradients[0] + at, mask=inside, other=0)
    by_decoder = tl.load(gradients[1] + at, mask=inside, other=0)
    _adam_latent(state, by_encoder, by_decoder, at, inside, rate)


@triton.jit
def sparse_adam_kernel(
    occurrences,
    pieces,
    more,  # codes.SubsetGradients, or None
    places_ptr,  # [d_sae] which of their rows is the latent's, or -1
    by_bias_ptr,  # [d_sae]
    state,  # codes.Latents
    raw,  # codes.RawRows, or None
    rate,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One latent: its gradients, which go nowhere but into Adam; that by its bias does."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < occurrences.d_in
    by_encoder, by_decoder, by_bias = latent_sums(
        occurrences, pieces, latent, columns, SLOTS, BLOCK
    )
    if more is not None:
        place = tl.load(places_ptr + latent)
        if place >= 0:
            begun = place * occurrences.d_in + columns
            by_encoder += tl.load(more.encoder + begun, mask=inside, other=0)
            by_decoder += tl.load(more.decoder + begun, mask=inside, other=0)
            by_bias += tl.load(more.bias + place)
    tl.store(by_bias_ptr + latent, by_bias)
    at = latent * occurrences.d_in + columns
    if raw is None:
        _adam_latent(state, by_encoder, by_decoder, at, inside, rate)
    else:
        _adam_raw_latent(state, raw, by_encoder, by_decoder, by_bias, latent, at, inside, rate)
