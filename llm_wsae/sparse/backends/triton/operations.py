"""The sparse operations on CUDA: cuBLAS for the encoder's product, Triton for the rest.

A tile of pre-activations is sized to stay in the card's L2 cache while the k largest of each row
are found, so batch × d_sae is never held. Nothing here waits for the device, except
``encode_above`` without a capacity.

In Triton's interpreter (``TRITON_INTERPRET=1`` before the first import) all of it runs on the CPU.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llm_wsae.sparse.backends import pytorch
from llm_wsae.sparse.backends.reference import BETAS, Gradients
from llm_wsae.sparse.backends.triton.adam import (
    More,
    Rate,
    State,
    adam_rows_kernel,
    sparse_adam_kernel,
)
from llm_wsae.sparse.backends.triton.select import above_kernel, activate_dead_kernel, select_kernel
from llm_wsae.sparse.backends.triton.sums import (
    Occurrences,
    Sums,
    decode_kernel,
    further_sums_kernel,
    latent_sums_kernel,
    reconstruct_kernel,
    value_gradients_kernel,
)
from llm_wsae.sparse.codes import (
    Codes,
    RaggedCodes,
    RawRows,
    Reconstruction,
    SlotCapacity,
    SparseGradients,
)

dead_gradients = pytorch.dead_gradients

_TILE_BYTES = 32 * 2**20  # of pre-activations: they stay in the L2 cache of a data-centre card
_FEWEST_ROWS = 128  # of a tile: fewer would idle the card
_PART = 4096  # entries that one program selects from, all in its registers
_BITS = {torch.float64: 64, torch.float32: 32, torch.bfloat16: 16}  # to compare numbers by
_SLOTS, _COLUMNS = 16, 256  # the tile of decoder or batch rows that a program reads at once
_HELD = 8192  # numbers of a tile where a program holds all columns
_SPAN = 128  # occurrences of a latent that one program sums: dense latents delay nobody


def encode_topk(x: Tensor, encoder: Tensor, bias: Tensor, k: int) -> Codes:
    """See ``operations``. Ties go to the lowest latents."""
    batch, d_sae = len(x), len(encoder)
    indices = torch.empty(batch, k, dtype=torch.int64, device=x.device)
    values = torch.empty(batch, k, dtype=_exact(x), device=x.device)
    for rows in _tiles(batch, d_sae * x.element_size()):
        _select(torch.addmm(bias, x[rows], encoder.T), Codes(indices[rows], values[rows]), True)
    return Codes(indices, values)


def select_topk(pre: Tensor, k: int) -> Codes:
    """See ``operations``. Ties go to the lowest latents."""
    indices = torch.empty(len(pre), k, dtype=torch.int64, device=pre.device)
    best = Codes(indices, torch.empty_like(indices, dtype=pre.dtype))
    _select(pre.contiguous(), best, False)
    return best


def encode_above(
    x: Tensor,
    encoder: Tensor,
    bias: Tensor,
    threshold: Tensor,
    capacity: SlotCapacity | None = None,
) -> RaggedCodes:
    """See ``operations``. Every row has as many slots as the capacity says; some are unused.

    Without ``capacity`` it waits for the device to report whether the slots were enough.
    """
    if capacity is not None:
        return _entries_above(x, encoder, bias, threshold, capacity)
    capacity = SlotCapacity()
    codes = _entries_above(x, encoder, bias, threshold, capacity)
    return codes if capacity.enough() else _entries_above(x, encoder, bias, threshold, capacity)


def encode_batch_topk(
    x: Tensor,
    encoder: Tensor,
    bias: Tensor,
    k: int,
    guess: float | Tensor,
    kept: Tensor | None = None,
) -> RaggedCodes:
    """See ``operations``. Ignores the guess: acting on it would mean waiting for the device.

    The result has batch·k slots whatever the values and however many rows are kept; excess slots
    are unused and have the value 0. Each tile keeps that many candidates.
    """
    batch, d_sae = len(x), len(encoder)
    slots = min(k * batch, batch * d_sae)
    values, places = [], []
    for rows in _tiles(batch, d_sae * x.element_size()):
        pre = torch.addmm(bias, x[rows], encoder.T).relu_()
        if kept is not None:
            pre *= kept[rows, None]
        best = pre.flatten().topk(min(slots, pre.numel()), sorted=False)
        values.append(best.values)
        places.append(best.indices + rows.start * d_sae)
    best = torch.cat(values).topk(slots, sorted=kept is not None)
    if kept is not None:
        ranks = torch.arange(slots, device=x.device)
        best.values.masked_fill_(ranks >= k * kept.sum(), 0)
    ordered, order = torch.cat(places)[best.indices].sort()
    starts = torch.arange(batch + 1, device=x.device) * d_sae
    return RaggedCodes(
        ordered % d_sae, best.values[order].to(_exact(x)), torch.searchsorted(ordered, starts)
    )


def encode_dead(x: Tensor, encoder: Tensor, bias: Tensor, dead: Tensor | None, k: int) -> Tensor:
    """See ``operations``. The cut is found and made in one pass over the product."""
    active = torch.addmm(bias, x, encoder.T)
    rows, width = active.shape
    _run(
        activate_dead_kernel,
        (rows,),
        active,
        active if dead is None else dead,
        width,
        k,
        MASKED=dead is not None,
        BITS=_BITS[active.dtype],
        BLOCK=min(1024, _power_of_two(width)),
    )
    return active


def decode(codes: RaggedCodes, decoder: Tensor, bias: Tensor) -> Tensor:
    """See ``operations``."""
    d_in = decoder.shape[1]
    out = torch.empty(codes.num_rows, d_in, dtype=codes.values.dtype, device=decoder.device)
    tile = _tile_of(d_in)
    _run(decode_kernel, (len(out), _blocks(d_in)), *codes, decoder, bias, out, d_in, **tile)
    return out


def value_gradients(codes: RaggedCodes, decoder: Tensor, output_gradient: Tensor) -> Tensor:
    """See ``operations``."""
    d_in = decoder.shape[1]
    out = torch.empty_like(codes.values)
    arguments = (*codes, decoder, output_gradient.contiguous(), out, d_in)
    _run(value_gradients_kernel, (codes.num_rows,), *arguments, **_tile_of(d_in))
    return out


def reconstruct(
    codes: RaggedCodes,
    decoder: Tensor,
    bias: Tensor,
    x: Tensor,
    row_weights: Tensor,
    column_weights: Tensor,
    fast: torch.dtype,
) -> Reconstruction:
    """See ``operations``. One launch; a program holds a row whole."""
    d_in = x.shape[1]
    result = Reconstruction.empty(codes, x, fast)
    given = (decoder, bias, x, row_weights, column_weights)
    arguments = (*codes, *(one.contiguous() for one in given), *result, d_in)
    whole = _whole_rows(d_in)
    _run(reconstruct_kernel, (len(x),), *arguments, SLOTS=_slots_beside(d_in), **whole)
    return result


def weight_gradients(gradients: SparseGradients, d_sae: int) -> Gradients:
    """See ``operations``, where ``gradients.more`` is added."""
    d_in, (exact, device) = gradients.x.shape[1], (gradients.codes.values.dtype, gradients.x.device)
    out = _empty_sums(d_sae, d_in, exact, device)
    grid = (d_sae, _blocks(d_in))
    _run(latent_sums_kernel, grid, *_by_latent(gradients, d_sae), out, **_tile_of(d_in))
    return out.encoder, out.decoder, out.bias


def sparse_adam(
    gradients: SparseGradients,
    rows: tuple[Tensor, Tensor],
    means: tuple[Tensor, Tensor],
    squares: tuple[Tensor, Tensor],
    step: int,
    learning_rate: float,
    encoder_fast: Tensor | None,
    raw: RawRows | None = None,
) -> Tensor:
    """See ``operations``. A latent's gradients never leave the program that sums them."""
    d_sae, d_in = rows[0].shape
    by_bias = torch.empty_like(rows[0][:, 0], memory_format=torch.contiguous_format)
    more = None
    if gradients.more is not None:
        places = gradients.more.places(d_sae, torch.int64)
        more = More(places, *(part.contiguous() for part in gradients.more[1:]))
    state = State(*rows, *means, *squares, encoder_fast)
    grouped, rate = _by_latent(gradients, d_sae), _rate(step, learning_rate)
    arguments = (*grouped, more, by_bias, state, raw, rate)
    whole = _whole_rows(d_in)
    _run(sparse_adam_kernel, (d_sae,), *arguments, SLOTS=_slots_beside(d_in), **whole)
    return by_bias


def _by_latent(gradients: SparseGradients, d_sae: int) -> tuple[Occurrences, Sums]:
    """The occurrences grouped by latent, and the partial sums of dense latents.

    One program sums a latent's first ``span`` occurrences; the further ones of a dense latent are
    summed here in pieces of ``span``. Those are few: at most slots // span, known without asking.
    """
    codes, x, output_gradient, by_value, _ = gradients
    device, (batch, d_in), num_slots = x.device, x.shape, len(codes.indices)
    narrow = torch.int16 if d_sae < 2**15 else torch.int32  # a radix sort pays by the byte
    used = (codes.values != 0) | (by_value != 0)
    latents, order = codes.indices.where(used, d_sae).to(narrow).sort(stable=True)
    bounds = torch.searchsorted(latents.long(), torch.arange(d_sae + 1, device=device))
    span = max(_SPAN, 4 * num_slots // d_sae)  # the pieces' sums are no more than a quarter of all
    further = torch.zeros_like(bounds)
    torch.cumsum(((bounds.diff() - 1) // span).clamp_(min=0), 0, out=further[1:])
    numbers = torch.arange(num_slots // span, device=device)
    owners = torch.searchsorted(further[1:], numbers, right=True)
    rows = (x.contiguous(), output_gradient.contiguous())
    sources = (order, codes.rows(), by_value.contiguous(), codes.values.contiguous(), *rows)
    grouped = Occurrences(bounds, further, *sources, batch, d_in, span)
    pieces = _empty_sums(len(owners), d_in, codes.values.dtype, device)
    arguments = (grouped, owners, pieces, d_sae)
    _run(further_sums_kernel, (len(owners), _blocks(d_in)), *arguments, **_tile_of(d_in))
    return grouped, pieces


def _empty_sums(number: int, d_in: int, dtype: torch.dtype, device: torch.device) -> Sums:
    shapes = ((number, d_in), (number, d_in), (number,))
    return Sums(*(torch.empty(shape, dtype=dtype, device=device) for shape in shapes))


def firing_counts(codes: RaggedCodes, d_sae: int) -> Tensor:
    """See ``operations``. Sums of ones are exact in any order."""
    counts = torch.zeros(d_sae, dtype=codes.values.dtype, device=codes.values.device)
    return counts.index_add_(0, codes.indices, (codes.values > 0).to(counts.dtype))


def adam_rows(
    rows: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    means: tuple[Tensor, Tensor],
    squares: tuple[Tensor, Tensor],
    step: int,
    learning_rate: float,
    encoder_fast: Tensor | None,
) -> None:
    """See ``operations``. One pass: every number is read and written once."""
    d_sae, d_in = rows[0].shape
    state = State(*rows, *means, *squares, encoder_fast)
    arguments = (tuple(gradients), state, _rate(step, learning_rate), d_in)
    _run(adam_rows_kernel, (d_sae,), *arguments, **_whole_rows(d_in))


def _rate(step: int, learning_rate: float) -> Rate:
    return Rate(learning_rate / (1 - BETAS[0] ** step), 1 / (1 - BETAS[1] ** step))


def _select(pre: Tensor, best: Codes, clip: bool) -> None:
    """The k largest of every row of ``pre`` into ``best``; with ``clip``, negative ones as 0.

    A row too wide for one program is cut into parts, and the k largest of each part compete.
    """
    rows, width = pre.shape
    k = best.indices.shape[1]
    parts = _ceil(width, _PART)
    if parts == 1:
        _select_parts(pre, None, best, 1, clip)
    elif parts * k <= _PART:
        numbers = torch.empty(rows, parts * k, dtype=torch.int32, device=pre.device)
        candidates = Codes(numbers, torch.empty_like(numbers, dtype=pre.dtype))
        _select_parts(pre, None, candidates, parts, False)
        _select_parts(candidates.values, numbers, best, 1, clip)
    else:  # hardly sparse
        values, indices = pre.topk(k, dim=1, sorted=False)
        best.indices.copy_(indices)
        best.values.copy_(values.relu_() if clip else values)


def _select_parts(
    values: Tensor, numbers: Tensor | None, best: Codes, parts: int, clip: bool
) -> None:
    rows, width = values.shape
    part = _ceil(width, parts)
    block = max(16, _power_of_two(part))
    _run(
        select_kernel,
        (rows, parts),
        values,
        values if numbers is None else numbers,
        best.values,
        best.indices,
        width,
        part,
        best.indices.shape[1] // parts,
        NUMBERED=numbers is not None,
        CLIP=clip,
        BITS=_BITS[values.dtype],
        BLOCK=block,
        num_warps=max(1, block // 512),
    )


def _entries_above(
    x: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor, capacity: SlotCapacity
) -> RaggedCodes:
    """The entries above, up to each row's slots; reports to ``capacity`` how many there are."""
    batch, d_sae = len(x), len(encoder)
    slots = min(capacity.slots, d_sae)
    starts = torch.arange(batch + 1, device=x.device) * slots
    # an unused slot names a latent too, and not all of them the same
    indices = torch.arange(batch * slots, device=x.device) % d_sae
    values = torch.zeros(batch * slots, dtype=_exact(x), device=x.device)
    counts = torch.empty(batch, dtype=torch.int64, device=x.device)
    for rows in _tiles(batch, d_sae * x.element_size()):
        pre = torch.addmm(bias, x[rows], encoder.T)
        arguments = (pre, threshold, starts[rows.start :], indices, values, counts[rows], d_sae)
        _run(above_kernel, (len(pre),), *arguments, BLOCK=min(1024, _power_of_two(d_sae)))
    capacity.report(counts)
    return RaggedCodes(indices, values, starts)


def _run(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Launch on the device of the tensors, which need not be the current one.

    Fusing of products and sums is named because Triton's default is about to change.
    """
    tensors = list(_tensors(arguments))
    assert all(tensor.is_contiguous() for tensor in tensors)
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*arguments, **constants, enable_fp_fusion=True)


def _tensors(arguments: tuple) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif isinstance(argument, Tensor):
            yield argument


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tiles(batch: int, row_bytes: int) -> list[slice]:
    """Slices of rows, a power of two of them; one even if there is no row."""
    rows = max(_FEWEST_ROWS, _power_of_two(_TILE_BYTES // row_bytes + 1) // 2)
    return [slice(start, min(start + rows, batch)) for start in range(0, max(1, batch), rows)]


def _tile_of(d_in: int) -> dict[str, int]:
    return {"SLOTS": _SLOTS, "BLOCK": min(_COLUMNS, _power_of_two(d_in))}


def _whole_rows(d_in: int) -> dict[str, int]:
    """For programs that hold all columns."""
    block = _power_of_two(d_in)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


def _slots_beside(d_in: int) -> int:
    """How many slots such a program reads at once."""
    return max(1, _HELD // _power_of_two(d_in))


def _blocks(d_in: int) -> int:
    return _ceil(d_in, _COLUMNS)


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _power_of_two(number: int) -> int:
    """The smallest one that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()
