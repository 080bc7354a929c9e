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
def _occurrence_sums(
    terms, begin, end, columns, exact: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Σ by_value·x[row], Σ value·gradient[row] and Σ by_value over sorted occurrences."""
    inside = columns < terms.d_in
    encoder = tl.zeros((BLOCK,), exact)
    decoder = tl.zeros((BLOCK,), exact)
    bias = tl.zeros((SLOTS,), exact)
    for first in range(begin, end, SLOTS):
        places = first + tl.arange(0, SLOTS)
        slots = tl.load(terms.order + places, mask=places < end, other=0)
        by_value = tl.load(terms.by_value + slots, mask=places < end, other=0).to(exact)
        values = tl.load(terms.activations + slots, mask=places < end, other=0).to(exact)
        used = (by_value != 0) | (values != 0)
        rows = tl.load(terms.rows + slots, mask=used, other=0).to(tl.int64)
        read = used[:, None] & inside[None, :]
        at = rows[:, None] * terms.d_in + columns[None, :]
        gradient = tl.load(terms.output_gradient + at, mask=read, other=0).to(exact)
        at = (rows % terms.batch)[:, None] * terms.d_in + columns[None, :]
        x = tl.load(terms.x + at, mask=read, other=0).to(exact)
        encoder += tl.sum(x * by_value[:, None], 0)
        decoder += tl.sum(gradient * values[:, None], 0)
        bias += by_value
    return encoder, decoder, tl.sum(bias, 0)


@triton.jit
@no_type_check
def further_sums_kernel(
    terms,
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
        inside = columns < terms.d_in
        number = 1 + piece - tl.load(terms.further + latent)  # within its latent
        begin = tl.load(terms.bounds + latent) + number * terms.span
        end = tl.minimum(begin + terms.span, tl.load(terms.bounds + latent + 1))
        exact: tl.constexpr = pieces.encoder.dtype.element_ty
        encoder, decoder, bias = _occurrence_sums(terms, begin, end, columns, exact, SLOTS, BLOCK)
        tl.store(pieces.encoder + piece * terms.d_in + columns, encoder, mask=inside)
        tl.store(pieces.decoder + piece * terms.d_in + columns, decoder, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(pieces.bias + piece, bias)


@triton.jit
@no_type_check
def latent_sums(terms, pieces, latent, columns, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Some columns of one latent's gradients: its first occurrences, then its further pieces."""
    inside = columns < terms.d_in
    begin = tl.load(terms.bounds + latent)
    end = tl.minimum(begin + terms.span, tl.load(terms.bounds + latent + 1))
    exact: tl.constexpr = pieces.encoder.dtype.element_ty
    encoder, decoder, bias = _occurrence_sums(terms, begin, end, columns, exact, SLOTS, BLOCK)
    for piece in range(tl.load(terms.further + latent), tl.load(terms.further + latent + 1)):
        at = piece * terms.d_in + columns
        encoder += tl.load(pieces.encoder + at, mask=inside, other=0)
        decoder += tl.load(pieces.decoder + at, mask=inside, other=0)
        bias += tl.load(pieces.bias + piece)
    return encoder, decoder, bias


@triton.jit
@no_type_check
def latent_sums_kernel(terms, pieces, out, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Some columns of one latent's gradients, to memory."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < terms.d_in
    encoder, decoder, bias = latent_sums(terms, pieces, latent, columns, SLOTS, BLOCK)
    tl.store(out.encoder + latent * terms.d_in + columns, encoder, mask=inside)
    tl.store(out.decoder + latent * terms.d_in + columns, decoder, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(out.bias + latent, bias)
