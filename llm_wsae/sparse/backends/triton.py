"""The sparse operations on CUDA: cuBLAS for the encoder's product, Triton for the rest.

What each operation does is said in ``llm_wsae.sparse.operations``. Nothing here waits for the
device, except ``encode_above`` without a capacity. In Triton's interpreter (``TRITON_INTERPRET=1``
before the first import) all of it runs on the CPU.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from llm_wsae.sparse.backends.triton_kernels import (
    Occurrences,
    Rate,
    Sums,
    above_kernel,
    activate_dead_kernel,
    adam_kernel,
    decode_kernel,
    further_sums_kernel,
    latent_sums_kernel,
    reconstruct_kernel,
    select_kernel,
    sparse_adam_kernel,
    value_gradients_kernel,
)
from llm_wsae.sparse.codes import (
    BETAS,
    Codes,
    Gradients,
    Latents,
    Product,
    RaggedCodes,
    RawRows,
    Reconstruction,
    SlotCapacity,
    SparseGradients,
    SubsetGradients,
    exact_dtype,
    offsets_of,
)

_TILE_BYTES = 32 * 2**20  # of pre-activations: they stay in the L2 cache of a data-centre card
_FEWEST_ROWS = 128  # of a tile: fewer would idle the card
_PART = 4096  # entries that one program selects from, all in its registers
_BITS = {torch.float64: 64, torch.float32: 32, torch.bfloat16: 16}  # to compare numbers by
_SLOTS, _COLUMNS = 16, 256  # the tile of decoder or batch rows that a program reads at once
_HELD = 8192  # numbers of a tile where a program holds all columns
_SPAN = 128  # occurrences of a latent that one program sums: dense latents delay nobody


def encode_topk(product: Product, k: int) -> Codes:
    """Ties go to the lowest latents."""
    x = product.x
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    values = torch.empty(len(x), k, dtype=exact_dtype(x), device=x.device)
    for rows in _tiles(product):
        _select(product.pre(rows), Codes(indices[rows], values[rows]))
    return Codes(indices, values.relu_())


def select_topk(pre: Tensor, k: int) -> Codes:
    """Ties go to the lowest latents."""
    indices = torch.empty(len(pre), k, dtype=torch.int64, device=pre.device)
    best = Codes(indices, torch.empty_like(indices, dtype=pre.dtype))
    _select(pre.contiguous(), best)
    return best


def encode_above(
    product: Product, threshold: Tensor, capacity: SlotCapacity | None = None
) -> RaggedCodes:
    """Every row has as many slots as the capacity says; some are unused."""
    if capacity is not None:
        return _entries_above(product, threshold, capacity)
    capacity = SlotCapacity()
    return capacity.retry(lambda: _entries_above(product, threshold, capacity), lambda fits: fits)


def encode_batch_topk(
    product: Product, k: int, guess: float | Tensor, kept: Tensor | None = None
) -> RaggedCodes:
    """Ignores the guess: acting on it would mean waiting for the device. There are batch·k slots
    however many rows are kept; excess ones are unused."""
    x, (batch, d_sae) = product.x, (len(product.x), len(product.encoder))
    slots = min(k * batch, batch * d_sae)
    values, places = [], []
    for rows in _tiles(product):
        pre = product.pre(rows).relu_()
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
        ordered % d_sae, best.values[order].to(exact_dtype(x)), torch.searchsorted(ordered, starts)
    )


def encode_dead(product: Product, dead: Tensor | None, k: int) -> Tensor:
    """The cut is found and made in one pass over the product."""
    active = product.pre()
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
        BLOCK=min(1024, next_power_of_2(max(1, width))),
    )
    return active


def decode(codes: RaggedCodes, decoder: Tensor, bias: Tensor) -> Tensor:
    d_in = decoder.shape[1]
    out = torch.empty(codes.num_rows, d_in, dtype=codes.values.dtype, device=decoder.device)
    tile = _tile_of(d_in)
    _run(decode_kernel, (len(out), _blocks(d_in)), *codes, decoder, bias, out, d_in, **tile)
    return out


def value_gradients(codes: RaggedCodes, decoder: Tensor, output_gradient: Tensor) -> Tensor:
    d_in = decoder.shape[1]
    out = torch.empty_like(codes.values)
    arguments = (*codes, decoder, output_gradient.contiguous(), out, d_in)
    _run(value_gradients_kernel, (codes.num_rows,), *arguments, **_tile_of(d_in))
    return out


def reconstruct(
    codes: RaggedCodes, target: tuple[Tensor, ...], fast: torch.dtype
) -> Reconstruction:
    """One launch; a program holds a row whole."""
    x = target[2]
    batch, d_in = x.shape
    result = Reconstruction.empty(codes, x, fast)
    arguments = (*codes, *(one.contiguous() for one in target), *result, d_in)
    whole = _whole_rows(d_in)
    _run(reconstruct_kernel, (batch,), *arguments, SLOTS=_slots_beside(d_in), **whole)
    return result


def weight_gradients(gradients: SparseGradients, d_sae: int) -> Gradients:
    """Without ``gradients.more``."""
    d_in, (exact, device) = gradients.x.shape[1], (gradients.codes.values.dtype, gradients.x.device)
    out = _empty_sums(d_sae, d_in, exact, device)
    grid = (d_sae, _blocks(d_in))
    _run(latent_sums_kernel, grid, *_by_latent(gradients, d_sae), out, **_tile_of(d_in))
    return out.encoder, out.decoder, out.bias


def sparse_adam(
    latents: Latents,
    gradients: SparseGradients,
    step: int,
    learning_rate: float,
    raw: RawRows | None = None,
) -> Tensor:
    """A latent's gradients never leave the program that sums them."""
    d_sae, d_in = latents.encoder.shape
    by_bias = torch.empty(d_sae, dtype=latents.encoder.dtype, device=latents.encoder.device)
    more, places = gradients.more, None
    if more is not None:
        more = SubsetGradients(*(part.contiguous() for part in more))
        places = more.places(d_sae, torch.int64)
    grouped, rate = _by_latent(gradients, d_sae), _rate(step, learning_rate)
    arguments = (*grouped, more, places, by_bias, latents, raw, rate)
    whole = _whole_rows(d_in)
    _run(sparse_adam_kernel, (d_sae,), *arguments, SLOTS=_slots_beside(d_in), **whole)
    return by_bias


def _by_latent(gradients: SparseGradients, d_sae: int) -> tuple[Occurrences, Sums]:
    """The occurrences grouped by latent, and what a dense latent has beyond its first ``span``,
    summed in pieces of ``span``: at most slots // span of them, known without asking."""
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


def adam(latents: Latents, gradients: Gradients, step: int, learning_rate: float) -> None:
    """One pass: every number is read and written once."""
    d_sae, d_in = latents.encoder.shape
    arguments = (gradients[:2], latents, _rate(step, learning_rate), d_in)
    _run(adam_kernel, (d_sae,), *arguments, **_whole_rows(d_in))


def _rate(step: int, learning_rate: float) -> Rate:
    return Rate(learning_rate / (1 - BETAS[0] ** step), 1 / (1 - BETAS[1] ** step))


def _select(pre: Tensor, best: Codes) -> None:
    """The k largest of every row into ``best``. Of a wide row those of each part compete."""
    rows, width = pre.shape
    k = best.indices.shape[1]
    parts = cdiv(width, _PART)
    if parts == 1:
        _select_parts(pre, best, 1)
    elif parts * k <= _PART:
        numbers = torch.empty(rows, parts * k, dtype=torch.int32, device=pre.device)
        candidates = Codes(numbers, torch.empty_like(numbers, dtype=pre.dtype))
        _select_parts(pre, candidates, parts)
        _select_parts(candidates.values, best, 1)
        best.indices.copy_(numbers.gather(1, best.indices))
    else:  # hardly sparse
        values, indices = pre.topk(k, dim=1, sorted=False)
        best.indices.copy_(indices)
        best.values.copy_(values)


def _select_parts(values: Tensor, best: Codes, parts: int) -> None:
    rows, width = values.shape
    part = cdiv(width, parts)
    block = max(16, next_power_of_2(part))
    _run(
        select_kernel,
        (rows, parts),
        values,
        best.values,
        best.indices,
        width,
        part,
        best.indices.shape[1] // parts,
        BITS=_BITS[values.dtype],
        BLOCK=block,
        num_warps=max(1, block // 512),
    )


def _entries_above(product: Product, threshold: Tensor, capacity: SlotCapacity) -> RaggedCodes:
    """The entries above, up to each row's slots; reports to ``capacity`` how many there are."""
    (x, encoder, _), device = product, product.x.device
    batch, d_sae = len(x), len(encoder)
    slots = min(capacity.slots, d_sae)
    starts = torch.arange(batch + 1, device=device) * slots
    # an unused slot names a latent too, and not all of them the same
    indices = torch.arange(batch * slots, device=device) % d_sae
    values = torch.zeros(batch * slots, dtype=exact_dtype(x), device=device)
    counts = torch.empty(batch, dtype=torch.int64, device=device)
    for rows in _tiles(product):
        pre = product.pre(rows)
        arguments = (pre, threshold, starts[rows.start :], indices, values, counts[rows], d_sae)
        _run(above_kernel, (len(pre),), *arguments, BLOCK=min(1024, next_power_of_2(d_sae)))
    capacity.report(counts)
    return RaggedCodes(indices, values, starts)


def _run(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Launch on the device of the tensors, which need not be the current one."""
    tensors = list(_tensors(arguments))
    assert all(tensor.is_contiguous() for tensor in tensors)
    with torch.cuda.device_of(tensors[0]):
        # named because Triton's default is about to change
        kernel[grid](*arguments, **constants, enable_fp_fusion=True)


def _tensors(arguments: tuple) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif isinstance(argument, Tensor):
            yield argument


def _tiles(product: Product) -> list[slice]:
    """Slices of rows, a power of two of them; one even if there is no row."""
    batch, row_bytes = len(product.x), len(product.encoder) * product.x.element_size()
    rows = max(_FEWEST_ROWS, next_power_of_2(_TILE_BYTES // row_bytes + 1) // 2)
    return [slice(start, min(start + rows, batch)) for start in range(0, max(1, batch), rows)]


def _tile_of(d_in: int) -> dict[str, int]:
    return {"SLOTS": _SLOTS, "BLOCK": min(_COLUMNS, next_power_of_2(d_in))}


def _whole_rows(d_in: int) -> dict[str, int]:
    """For programs that hold all columns."""
    block = next_power_of_2(d_in)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


def _slots_beside(d_in: int) -> int:
    """How many slots such a program reads at once."""
    return max(1, _HELD // next_power_of_2(d_in))


def _blocks(d_in: int) -> int:
    return cdiv(d_in, _COLUMNS)
