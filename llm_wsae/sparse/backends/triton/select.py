"""Triton kernels that choose entries of pre-activations: the k largest of a row, or all above.

Nothing is tuned at run time and ties have a rule, so that the same input gives the same codes.
Offsets that are products are int64.
"""

import triton
import triton.language as tl


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
    if NUMBERED:
        columns = tl.load(numbers_ptr + at, mask=kept & inside, other=0)
    tl.store(chosen_ptr + slots, columns, mask=kept)
    # read anew: in registers only the keys were kept
    values = tl.load(values_ptr + at, mask=kept & inside, other=-float("inf"))
    values = values.to(best_ptr.dtype.element_ty)
    if CLIP:
        values = tl.where(values < 0, 0.0, values)
    tl.store(best_ptr + slots, values, mask=kept)


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
    """Entries of one row above their thresholds into its slots, as many as fit; and how many are.

    Counted in full even where they do not fit, so that the caller learns how many slots they need.
    """
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
    """Activations of one row, 0 where they are below the k-th largest.

    That one is found bit by bit from the top: the bits of numbers that are not negative are in the
    order of the numbers. The row is read anew for every bit, from the cache.
    """
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
