"""Triton kernels of Adam over the weights of latents, the gradients given or made on the way.

A program holds both rows of its latent whole, so that every number is read and written once.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from llm_wsae.sparse import codes
from llm_wsae.sparse.backends.triton.sums import latent_sums

_KEEP_MEAN, _KEEP_SQUARE = (tl.constexpr(beta) for beta in codes.BETAS)
_EPSILON = tl.constexpr(codes.EPSILON)
_SMALLEST_NORM = tl.constexpr(codes.SMALLEST_NORM)


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
