"""The sparse operations on CUDA: cuBLAS for the encoder's product, Triton kernels for the rest.

What each operation does is said in ``operations``. Nothing here waits for the device, except
``encode_above`` without a capacity. In Triton's interpreter (``TRITON_INTERPRET=1`` before the
first import) all of it runs on the CPU. Nothing is tuned at run time, ties have a rule, and one
program owns what it writes, so that results are the same every time. Offsets that are products are
int64. Rows are read in tiles of slots × columns, so that many loads are under way at once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton import cdiv, next_power_of_2

from llm_wsae.sparse import codes as constants
from llm_wsae.sparse.codes import (
    Codes,
    Gradients,
    Latents,
    Product,
    RaggedCodes,
    RawRows,
    SlotCapacity,
    SparseGradients,
    SubsetGradients,
    exact_dtype,
    offsets_of,
    ragged,
)
from llm_wsae.sparse.operations import topk_of_tiles

_TILE_BYTES = 32 * 2**20  # of pre-activations: they stay in the L2 cache of a data-centre card
_FEWEST_ROWS = 128  # of a tile: fewer would idle the card
_PART = 4096  # entries that one program selects from, all in its registers
_SLOTS, _COLUMNS = 16, 256  # the tile of decoder or batch rows that a program reads at once
_HELD = 8192  # numbers of a tile where a program holds all columns
_SPAN = 128  # occurrences of a latent that one program sums: dense latents delay nobody
_KEEP_MEAN, _KEEP_SQUARE = (tl.constexpr(beta) for beta in constants.BETAS)
_EPSILON = tl.constexpr(constants.EPSILON)
_SMALLEST_NORM = tl.constexpr(constants.SMALLEST_NORM)

# --- The largest entries of a row, or all above a threshold


@triton.jit
def _select_kernel(values_ptr, best_ptr, chosen_ptr, width, part_width, k, BLOCK: tl.constexpr):
    """The k largest of the values [rows, width] in one part of one row, in order of position, and
    where they are, both [rows, parts, k]; the first ones where tied. k is at most the part's width.

    Floats are compared as integers of the same order; NaN is the largest, so that it is seen. The
    k-th largest is found bit by bit. Positions beyond the row count as -inf and come last, so they
    are chosen only in a part with fewer than k entries, and never from among the candidates of all
    parts.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    columns = part * part_width + lanes
    inside = (lanes < part_width) & (columns < width)
    at = row * width + columns
    values = tl.load(values_ptr + at, mask=inside, other=-float("inf")).to(tl.float32)
    bits = values.to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = tl.where(values != values, 0x7FFFFFFF, keys)
    number_of_bits: tl.constexpr = values_ptr.dtype.element_ty.primitive_bitwidth
    keys = (keys >> (32 - number_of_bits)) << (32 - number_of_bits)
    one = tl.full((), 1, tl.int32)
    kth = tl.where(tl.sum((keys >= 0).to(tl.int32)) >= k, one - one, one << 31)
    for step in range(2, number_of_bits + 1):
        higher = kth + (one << (32 - step))
        kth = tl.where(tl.sum((keys >= higher).to(tl.int32)) >= k, higher, kth)
    above = keys > kth
    tied = (keys == kth).to(tl.int32)
    kept = above | ((tied > 0) & (tl.cumsum(tied, 0) <= k - tl.sum(above.to(tl.int32))))
    slots = (row * tl.num_programs(1) + part) * k + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(chosen_ptr + slots, columns, mask=kept)
    # read anew: in registers only the keys were kept
    values = tl.load(values_ptr + at, mask=kept & inside, other=-float("inf"))
    tl.store(best_ptr + slots, values, mask=kept)


def _select(values: Tensor, k: int, parts: int) -> Codes:
    """The k largest of every part of a row."""
    rows, width = values.shape
    indices = torch.empty(rows, parts * k, dtype=torch.int64, device=values.device)
    best = Codes(indices, torch.empty_like(indices, dtype=values.dtype))
    part = cdiv(width, parts)
    block = max(16, next_power_of_2(part))
    arguments = (values, best.values, best.indices, width, part, k)
    _run(_select_kernel, (rows, parts), *arguments, BLOCK=block, num_warps=max(1, block // 512))
    return best


def select_topk(pre: Tensor, k: int) -> Codes:
    """Ties go to the lowest latents. Of a wide row those of each part compete."""
    parts = cdiv(pre.shape[1], _PART)
    if parts > 1 and parts * k > _PART:  # hardly sparse
        values, indices = pre.topk(k, dim=1, sorted=False)
        return Codes(indices, values)
    best = _select(pre.contiguous(), k, parts)
    if parts == 1:
        return best
    chosen = _select(best.values, k, 1)
    return Codes(best.indices.gather(1, chosen.indices), chosen.values)


def encode_topk(product: Product, k: int) -> Codes:
    """Ties go to the lowest latents."""
    return topk_of_tiles(product, k, _tile_rows(product))


def encode_batch_topk(
    product: Product, k: int, guess: float | Tensor, kept: Tensor | None = None
) -> RaggedCodes:
    """Ignores the guess, which would mean waiting for the device. There are batch·k slots however
    many rows are kept; excess ones are unused."""
    x, (batch, d_sae) = product.x, (len(product.x), len(product.encoder))
    slots = min(k * batch, batch * d_sae)
    values, places, rows = [], [], _tile_rows(product)
    for number, tile in enumerate(product.tiles(rows)):
        pre, start = tile.pre().relu_(), number * rows
        if kept is not None:
            pre *= kept[start : start + rows, None]
        best = pre.flatten().topk(min(slots, pre.numel()), sorted=False)
        values.append(best.values)
        places.append(best.indices + start * d_sae)
    best = torch.cat(values).topk(slots, sorted=kept is not None)
    if kept is not None:
        ranks = torch.arange(slots, device=x.device)
        best.values.masked_fill_(ranks >= k * kept.sum(), 0)
    ordered, order = torch.cat(places)[best.indices].sort()
    starts = torch.arange(batch + 1, device=x.device) * d_sae
    found = best.values[order].to(exact_dtype(x))
    return RaggedCodes(ordered % d_sae, found, torch.searchsorted(ordered, starts))


@triton.jit
def _above_kernel(
    pre_ptr, threshold_ptr, indices_ptr, values_ptr, counts_ptr, width, slots, BLOCK: tl.constexpr
):
    """Entries of one row [width] above their thresholds into its slots, as many as fit; and how
    many there are."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    found = tl.zeros((), tl.int32)
    for left in range(0, width, BLOCK):
        columns = left + lanes
        inside = columns < width
        threshold = tl.load(threshold_ptr + columns, mask=inside, other=0)
        pre = tl.load(pre_ptr + row * width + columns, mask=inside, other=0).to(threshold.dtype)
        active = inside & (pre > threshold)
        places = found + tl.cumsum(active.to(tl.int32), 0) - 1
        fits = active & (places < slots)
        tl.store(indices_ptr + row * slots + places, columns, mask=fits)
        tl.store(values_ptr + row * slots + places, pre, mask=fits)
        found += tl.sum(active.to(tl.int32))
    tl.store(counts_ptr + row, found)


def encode_above(
    product: Product, threshold: Tensor, capacity: SlotCapacity | None = None
) -> RaggedCodes:
    """Every row has as many slots as the capacity says; some are unused."""
    if capacity is None:
        own = SlotCapacity()
        return own.retry(lambda: encode_above(product, threshold, own), bool)
    x, device, d_sae = product.x, product.x.device, len(product.encoder)
    slots, rows = min(capacity.slots, d_sae), _tile_rows(product)
    # an unused slot names a latent too, and not all of them the same
    indices = (torch.arange(len(x) * slots, device=device) % d_sae).view(len(x), slots)
    values = torch.zeros(indices.shape, dtype=exact_dtype(x), device=device)
    counts = torch.empty(len(x), dtype=torch.int64, device=device)
    parts = (part.split(rows) for part in (indices, values, counts))
    for tile, *found in zip(product.tiles(rows), *parts, strict=True):
        arguments = (tile.pre(), threshold, *found, d_sae, slots)
        _run(_above_kernel, (len(tile.x),), *arguments, BLOCK=min(1024, next_power_of_2(d_sae)))
    capacity.report(counts)
    return ragged(Codes(indices, values))


def _tile_rows(product: Product) -> int:
    """How many rows' pre-activations exist at once, a power of two."""
    row_bytes = len(product.encoder) * product.x.element_size()
    return max(_FEWEST_ROWS, next_power_of_2(_TILE_BYTES // row_bytes + 1) // 2)


# --- Sums along sparse codes: over the rows of a batch, and over the occurrences of a latent


@triton.jit
def _decode_kernel(
    codes, decoder_ptr, bias_ptr, out_ptr, d_in, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Some columns of one row: Σ value · decoder[index] + bias. Unused slots are not read."""
    indices_ptr, values_ptr, offsets_ptr = codes
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d_in
    end = tl.load(offsets_ptr + row + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.load(offsets_ptr + row), end, SLOTS):
        slots = first + tl.arange(0, SLOTS)
        values = tl.load(values_ptr + slots, mask=slots < end, other=0)
        used = values != 0
        latents = tl.load(indices_ptr + slots, mask=used, other=0)
        at = latents[:, None] * d_in + columns[None, :]
        tile = tl.load(decoder_ptr + at, mask=used[:, None] & inside[None, :], other=0)
        total += tl.sum(tile.to(tl.float32) * values[:, None], 0)
    total += tl.load(bias_ptr + columns, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + row * d_in + columns, total, mask=inside)


def decode(codes: RaggedCodes, decoder: Tensor, bias: Tensor) -> Tensor:
    d_in = decoder.shape[1]
    out = torch.empty(codes.num_rows, d_in, dtype=codes.values.dtype, device=decoder.device)
    _run_by_columns(_decode_kernel, len(out), codes, decoder, bias, out, d_in)
    return out


@triton.jit
def _value_gradients_kernel(
    codes, decoder_ptr, gradient_ptr, out_ptr, d_in, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """All slots of one row: decoder[index] · output gradient where the value is above 0, else 0."""
    indices_ptr, values_ptr, offsets_ptr = codes
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(offsets_ptr + row + 1)
    for first in range(tl.load(offsets_ptr + row), end, SLOTS):
        slots = first + tl.arange(0, SLOTS)
        used = tl.load(values_ptr + slots, mask=slots < end, other=0) > 0
        latents = tl.load(indices_ptr + slots, mask=used, other=0)
        products = tl.zeros((SLOTS, BLOCK), tl.float32)
        for left in range(0, d_in, BLOCK):
            columns = left + tl.arange(0, BLOCK)
            inside = columns < d_in
            gradient = tl.load(gradient_ptr + row * d_in + columns, mask=inside, other=0)
            at = latents[:, None] * d_in + columns[None, :]
            tile = tl.load(decoder_ptr + at, mask=used[:, None] & inside[None, :], other=0)
            products += tile.to(tl.float32) * gradient[None, :]
        tl.store(out_ptr + slots, tl.sum(products, 1), mask=slots < end)


def value_gradients(codes: RaggedCodes, decoder: Tensor, output_gradient: Tensor) -> Tensor:
    d_in = decoder.shape[1]
    out = torch.empty_like(codes.values)
    arguments = (codes, decoder, output_gradient.contiguous(), out, d_in)
    _run(_value_gradients_kernel, (codes.num_rows,), *arguments, **_tile_of(d_in))
    return out


class _Occurrences(NamedTuple):
    """``codes.SparseGradients`` grouped by latent; pointers in the kernels."""

    bounds: Tensor  # [d_sae + 1] where each latent's occurrences begin
    further: Tensor  # [d_sae + 1] where each latent's further pieces begin
    order: Tensor  # [slots] in order of latents
    rows: Tensor  # [slots] each one's row
    by_value: Tensor  # [slots] the gradient by each value
    activations: Tensor  # [slots] of the codes; Triton's tuples have a ``values`` of their own
    x: Tensor  # [batch, d_in]
    output_gradient: Tensor  # [batches, d_in]; row i belongs to row i mod batch of x
    batch: int
    d_in: int
    span: int  # occurrences in a piece


@triton.jit
def _sums_between(
    occurrences, begin, end, columns, inside, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Σ by_value·x[row], Σ value·gradient[row] and Σ by_value over sorted occurrences."""
    encoder = tl.zeros((BLOCK,), tl.float32)
    decoder = tl.zeros((BLOCK,), tl.float32)
    bias = tl.zeros((SLOTS,), tl.float32)
    for first in range(begin, end, SLOTS):
        places = first + tl.arange(0, SLOTS)
        slots = tl.load(occurrences.order + places, mask=places < end, other=0)
        by_value = tl.load(occurrences.by_value + slots, mask=places < end, other=0)
        values = tl.load(occurrences.activations + slots, mask=places < end, other=0)
        used = (by_value != 0) | (values != 0)
        rows = tl.load(occurrences.rows + slots, mask=used, other=0).to(tl.int64)
        read = used[:, None] & inside[None, :]
        at = rows[:, None] * occurrences.d_in + columns[None, :]
        gradient = tl.load(occurrences.output_gradient + at, mask=read, other=0).to(tl.float32)
        at = (rows % occurrences.batch)[:, None] * occurrences.d_in + columns[None, :]
        x = tl.load(occurrences.x + at, mask=read, other=0).to(tl.float32)
        encoder += tl.sum(x * by_value[:, None], 0)
        decoder += tl.sum(gradient * values[:, None], 0)
        bias += by_value
    return encoder, decoder, tl.sum(bias, 0)


@triton.jit
def _further_sums_kernel(
    occurrences, pieces, d_sae, d_in, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Some columns of one further piece: up to ``span`` occurrences of a latent that has more. The
    piece of no latent has the number d_sae."""
    piece = tl.program_id(0).to(tl.int64)
    latent = tl.load(pieces.latents + piece)
    if latent < d_sae:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < d_in
        number = 1 + piece - tl.load(occurrences.further + latent)  # within its latent
        begin = tl.load(occurrences.bounds + latent) + number * occurrences.span
        end = tl.minimum(begin + occurrences.span, tl.load(occurrences.bounds + latent + 1))
        encoder, decoder, bias = _sums_between(
            occurrences, begin, end, columns, inside, SLOTS, BLOCK
        )
        tl.store(pieces.encoder + piece * d_in + columns, encoder, mask=inside)
        tl.store(pieces.decoder + piece * d_in + columns, decoder, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(pieces.bias + piece, bias)


def _by_latent(gradients: SparseGradients, d_sae: int) -> tuple[_Occurrences, SubsetGradients]:
    """The occurrences grouped by latent, and what a dense latent has beyond its first ``span``,
    summed in at most slots // span pieces, a number known without asking. ``latents`` says whose
    piece each is."""
    codes, x, output_gradient, by_value, _ = gradients
    device, (batch, d_in), num_slots = x.device, x.shape, len(codes.indices)
    narrow = torch.int16 if d_sae < 2**15 else torch.int32  # a radix sort pays by the byte
    used = (codes.values != 0) | (by_value != 0)
    latents, order = codes.indices.where(used, d_sae).to(narrow).sort(stable=True)
    bounds = torch.searchsorted(latents.long(), torch.arange(d_sae + 1, device=device))
    span = max(_SPAN, 4 * num_slots // d_sae)  # the pieces' sums are no more than a quarter of all
    further = offsets_of(((bounds.diff() - 1) // span).clamp_(min=0))
    numbers = torch.arange(num_slots // span, device=device)
    owners = torch.searchsorted(further[1:], numbers, right=True)
    terms = (order, codes.rows(), by_value.contiguous(), codes.values.contiguous())
    rows = (x.contiguous(), output_gradient.contiguous())
    grouped = _Occurrences(bounds, further, *terms, *rows, batch, d_in, span)
    pieces = SubsetGradients(owners, *_empty_sums(len(owners), codes.values, d_in))
    _run_by_columns(_further_sums_kernel, len(owners), grouped, pieces, d_sae, d_in)
    return grouped, pieces


def _empty_sums(number: int, like: Tensor, d_in: int) -> Gradients:
    return like.new_empty(number, d_in), like.new_empty(number, d_in), like.new_empty(number)


@triton.jit
def _latent_sums(
    occurrences, pieces, latent, columns, inside, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Some columns of one latent's gradients: its first occurrences, then its further pieces."""
    begin = tl.load(occurrences.bounds + latent)
    end = tl.minimum(begin + occurrences.span, tl.load(occurrences.bounds + latent + 1))
    encoder, decoder, bias = _sums_between(occurrences, begin, end, columns, inside, SLOTS, BLOCK)
    first_piece = tl.load(occurrences.further + latent)
    for piece in range(first_piece, tl.load(occurrences.further + latent + 1)):
        at = piece * occurrences.d_in + columns
        encoder += tl.load(pieces.encoder + at, mask=inside, other=0)
        decoder += tl.load(pieces.decoder + at, mask=inside, other=0)
        bias += tl.load(pieces.bias + piece)
    return encoder, decoder, bias


@triton.jit
def _weight_gradients_kernel(
    occurrences, pieces, out, d_in, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Some columns of one latent's gradients, to memory."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d_in
    encoder, decoder, bias = _latent_sums(
        occurrences, pieces, latent, columns, inside, SLOTS, BLOCK
    )
    tl.store(out[0] + latent * d_in + columns, encoder, mask=inside)
    tl.store(out[1] + latent * d_in + columns, decoder, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(out[2] + latent, bias)


def weight_gradients(gradients: SparseGradients, d_sae: int) -> Gradients:
    """Without ``gradients.more``."""
    d_in = gradients.x.shape[1]
    out = _empty_sums(d_sae, gradients.codes.values, d_in)
    _run_by_columns(_weight_gradients_kernel, d_sae, *_by_latent(gradients, d_sae), out, d_in)
    return out


# --- Adam, its gradients made on the way; a program holds both rows of its latent whole


class _Rate(NamedTuple):
    step_size: float  # learning rate / (1 - beta1^step)
    square_scale: float  # 1 / (1 - beta2^step)


@triton.jit
def _adam_row(row_ptr, mean_ptr, square_ptr, gradient, at, inside, rate, scale):
    """Moments updated in place; the new row, of one that is ``scale`` times what is stored."""
    mean = tl.load(mean_ptr + at, mask=inside, other=0)
    square = tl.load(square_ptr + at, mask=inside, other=0)
    mean += (gradient - mean) * (1 - _KEEP_MEAN)
    square = square * _KEEP_SQUARE + gradient * gradient * (1 - _KEEP_SQUARE)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
    row = scale * tl.load(row_ptr + at, mask=inside, other=0)
    return row - rate.step_size * mean / (tl.sqrt(square * rate.square_scale) + _EPSILON)


@triton.jit
def _adam_latent(state, raw, by_encoder, by_decoder, by_bias, latent, at, inside, rate):
    """Adam over a latent's two rows, the decoder's to norm 1, and a copy of the encoder's.

    With ``raw`` it is over length · decoder and encoder / length; the new length is the norm."""
    length = 1.0
    if raw is not None:
        length = tl.load(raw.lengths + latent)
        encoder = tl.load(state.encoder + at, mask=inside, other=0)
        decoder = tl.load(state.decoder + at, mask=inside, other=0)
        by_length = by_bias * tl.load(raw.bias + latent)
        by_length += tl.sum(by_encoder * encoder - by_decoder * decoder, 0)
        by_decoder = (by_decoder + by_length * decoder) / length
        by_encoder *= length
    mean, square = state.decoder_mean, state.decoder_square
    row = _adam_row(state.decoder, mean, square, by_decoder, at, inside, rate, length)
    norm = tl.maximum(tl.sqrt(tl.sum(row * row, 0)), _SMALLEST_NORM)
    tl.store(state.decoder + at, row / norm, mask=inside)
    mean, square = state.encoder_mean, state.encoder_square
    row = _adam_row(state.encoder, mean, square, by_encoder, at, inside, rate, 1 / length)
    if raw is not None:
        row *= norm
        tl.store(raw.lengths + latent, norm)
    tl.store(state.encoder + at, row, mask=inside)
    if state.encoder_fast is not None:
        tl.store(state.encoder_fast + at, row.to(state.encoder_fast.dtype.element_ty), mask=inside)


@triton.jit
def _sparse_adam_kernel(
    sums, more, by_bias_ptr, state, raw, rate, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """One latent: its gradients, which go nowhere but into Adam, except that by its bias. ``more``
    are further gradients and which of their rows is each latent's, or -1; ``raw`` may be None."""
    occurrences, pieces = sums
    more, places_ptr = more
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < occurrences.d_in
    by_encoder, by_decoder, by_bias = _latent_sums(
        occurrences, pieces, latent, columns, inside, SLOTS, BLOCK
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
    _adam_latent(state, raw, by_encoder, by_decoder, by_bias, latent, at, inside, rate)


def sparse_adam(
    latents: Latents,
    gradients: SparseGradients,
    step: int,
    learning_rate: float,
    raw: RawRows | None = None,
) -> Tensor:
    """A latent's gradients never leave the program that sums them."""
    d_sae, d_in = latents.encoder.shape
    by_bias = latents.encoder.new_empty(d_sae)
    more, places = gradients.more, None
    if more is not None:
        more = SubsetGradients(*(part.contiguous() for part in more))
        places = more.places(d_sae, torch.int64)
    first, second = (1 - beta**step for beta in constants.BETAS)
    rate = _Rate(learning_rate / first, 1 / second)
    arguments = (_by_latent(gradients, d_sae), (more, places), by_bias, latents, raw, rate)
    block = next_power_of_2(d_in)
    slots, warps = max(1, _HELD // block), min(16, max(1, block // 256))
    _run(_sparse_adam_kernel, (d_sae,), *arguments, SLOTS=slots, BLOCK=block, num_warps=warps)
    return by_bias


# --- Launches


def _run_by_columns(kernel, number: int, *arguments) -> None:
    """A program for each block of columns of each of ``number`` rows; the last argument is d_in."""
    d_in = arguments[-1]
    _run(kernel, (number, cdiv(d_in, _COLUMNS)), *arguments, **_tile_of(d_in))


def _tile_of(d_in: int) -> dict[str, int]:
    return {"SLOTS": _SLOTS, "BLOCK": min(_COLUMNS, next_power_of_2(d_in))}


def _run(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Launch on the device of the tensors, which need not be the current one."""
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    assert all(tensor.is_contiguous() for tensor in tensors)
    with torch.cuda.device_of(tensors[0]):
        # named because Triton's default is about to change
        kernel[grid](*arguments, **constants, enable_fp_fusion=True)
