"""Triton kernels over the rows of a batch, along their sparse codes.

One program owns what it writes, so that nothing is added up in an order that the scheduler decides,
and results are the same every time. Offsets that are products are int64. Rows are read in tiles of
slots × columns, so that many loads are under way at once.

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
    """One row whole: decode it, weigh what is left, and the gradients by its values from that.

    The decoder's rows are read twice, the second time from the cache.
    """
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
