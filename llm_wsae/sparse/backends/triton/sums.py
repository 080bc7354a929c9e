"""Triton kernels that sum along sparse codes: over the rows of a batch, and over latents, whose
weights' gradients are sums over their occurrences.

One program owns what it writes, so that nothing is added up in an order that the scheduler decides,
and results are the same every time. Offsets that are products are int64. Rows are read in tiles of
slots × columns, so that many loads are under way at once. What a latent that occurs often has
beyond its first occurrences is summed in pieces before.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


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
