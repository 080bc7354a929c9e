"""Triton kernels over latents: the gradients of their weights, summed over their occurrences.

As in ``triton_rows``, one program owns what it writes and results are the same every time. What a
latent that occurs often has beyond its first occurrences is summed in pieces before.

``no_type_check`` keeps the tests' shape checks off functions that are compiled from their source.
"""

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl
from torch import Tensor


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
@no_type_check
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
@no_type_check
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
@no_type_check
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
@no_type_check
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
