"""The sparse operations in plain torch: any device, any floating type, differentiable.

What is a sum of few rows is an embedding bag: decoding sums decoder rows over a row's latents, and
a weight gradient sums rows over a latent's occurrences. Both weight gradients need the occurrences
grouped by latent, so one sort serves both.

What each operation does is said in ``operations``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.optim import adam as torch_adam

from llm_wsae.sparse.codes import (
    BETAS,
    EPSILON,
    SMALLEST_NORM,
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
    Target,
    exact_dtype,
    joined,
    keep_slots,
    offsets_of,
)

_TILE_ROWS = 512  # pre-activations of one tile stay in cache and batch × d_sae is never held
_TILE_LATENTS = 2048
_GROUP = 8  # members of a group in the two-stage selection


_threshold_backward = torch.ops.aten.threshold_backward  # of a ReLU: one pass, no mask


def encode_topk(product: Product, k: int) -> Codes:
    tiles = [select_topk(tile.pre(), k) for tile in product.tiles(_TILE_ROWS)]
    indices, values = zip(*tiles, strict=True)
    return Codes(torch.cat(indices), torch.cat(values).to(exact_dtype(product.x)).relu_())


def encode_above(
    product: Product, threshold: Tensor, capacity: SlotCapacity | None = None
) -> RaggedCodes:
    """Ignores ``capacity``: the codes have exactly the slots they need."""
    return joined([_above(tile, threshold) for tile in product.tiles(_TILE_ROWS)])


def encode_batch_topk(
    product: Product, k: int, guess: float | Tensor, kept: Tensor | None = None
) -> RaggedCodes:
    return largest_of_batch(_above, _TILE_ROWS, product, k, float(guess), kept)


def largest_of_batch(
    above: Callable[[Product, float], RaggedCodes],
    tile_rows: int,
    product: Product,
    k: int,
    guess: float,
    kept: Tensor | None,
) -> RaggedCodes:
    """``encode_batch_topk``, where ``above`` finds the entries of a tile.

    Once as many as are wanted are held, the smallest of them bounds what later tiles may add, so
    the candidates stay few. The bound starts below the guess; if that was too high still, lower,
    and then at 0.
    """
    if kept is not None and not bool(kept.all()):
        of_kept = product._replace(x=product.x[kept])
        codes = largest_of_batch(above, tile_rows, of_kept, k, guess, None)
        return codes._replace(offsets=codes.offsets[offsets_of(kept)])
    wanted = min(k, len(product.encoder)) * len(product.x)
    for start in dict.fromkeys(max(0.0, share * guess) for share in (0.9, 0.5, 0.0)):
        bound, held, parts = start, 0, []
        for tile in product.tiles(tile_rows):
            parts.append(above(tile, bound))
            held += len(parts[-1].indices)
            if held > 2 * wanted:
                parts = [_largest(joined(parts), wanted)]
                held = wanted
                bound = float(parts[0].values.min()) if wanted else bound
        if held >= wanted:
            break
    return _largest(joined(parts), wanted)


def _largest(codes: RaggedCodes, count: int) -> RaggedCodes:
    """The ``count`` largest values of the codes, the first ones where they tie; all if fewer."""
    if len(codes.values) <= count:
        return codes
    smallest = codes.values.topk(count, sorted=False).values.min()
    keep = codes.values > smallest
    ties = (codes.values == smallest).nonzero().flatten()
    keep[ties[: count - int(keep.sum())]] = True
    return keep_slots(codes, keep)


def select_topk(pre: Tensor, k: int) -> Codes:
    """Two stages: the k largest entries lie in the k groups with the largest maxima.

    A group's members stand d_sae / 8 apart, so that its maximum is an elementwise maximum of
    contiguous runs.
    """
    batch, d_sae = pre.shape
    stride = d_sae // _GROUP
    if d_sae % _GROUP or k >= stride:
        values, indices = pre.topk(k, dim=1, sorted=False)
        return Codes(indices, values)
    groups = pre.view(batch, _GROUP, stride).amax(1).topk(k, dim=1, sorted=False).indices
    offsets = torch.arange(0, d_sae, stride, device=pre.device)
    candidates = (groups[:, :, None] + offsets).flatten(1)
    values, chosen = pre.gather(1, candidates).topk(k, dim=1, sorted=False)
    return Codes(candidates.gather(1, chosen), values)


def encode_dead(product: Product, dead: Tensor | None, k: int) -> Tensor:
    active = product.pre().relu_()
    if dead is not None:
        active *= dead
    if k < len(product.encoder):
        active *= active >= active.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    return active


def dead_gradients(
    active: Tensor, x: Tensor, decoder: Tensor, output_gradient: Tensor, sums: SubsetGradients
) -> None:
    by_latent = _threshold_backward(output_gradient @ decoder.T, active, 0)
    sums.bias.add_(by_latent.sum(0, dtype=sums.bias.dtype))
    add_products(by_latent, x, sums.encoder)
    add_products(active, output_gradient, sums.decoder)


def add_products(
    latents: Float[Tensor, "batch some"],
    rows: Float[Tensor, "batch d_in"],
    sums: Float[Tensor, "some d_in"],
) -> None:
    """Add latentsᵀ · rows, which may be rounded, to sums that are not, some latents at a time."""
    for some in (slice(i, i + _TILE_LATENTS) for i in range(0, len(sums), _TILE_LATENTS)):
        sums[some] += latents[:, some].T @ rows


def decode(codes: RaggedCodes, decoder: Tensor, bias: Tensor) -> Tensor:
    return _bags(codes.indices, decoder, codes.offsets, codes.values.to(decoder.dtype)).add_(bias)


def reconstruct(codes: RaggedCodes, target: Target, fast: torch.dtype) -> Reconstruction:
    decoder, bias, x, row_weights, column_weights = target
    residual = decode(codes, decoder, bias).sub_(x).mul_(row_weights[:, None])
    gradient = residual * column_weights
    by_value = value_gradients(codes, decoder, gradient)
    return Reconstruction(residual, gradient.to(fast), by_value, (residual * gradient).sum(1))


def value_gradients(codes: RaggedCodes, decoder: Tensor, output_gradient: Tensor) -> Tensor:
    gradient = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        output_gradient,
        decoder.to(output_gradient.dtype),
        codes.indices,
        codes.offsets[:-1],
        codes.rows(),
        0,
    )
    return gradient.mul_(codes.values > 0)


def weight_gradients(gradients: SparseGradients, d_sae: int) -> Gradients:
    """Without ``gradients.more``."""
    codes, x, output_gradient, by_value, _ = gradients
    latents, order = codes.indices.sort(stable=True)
    rows = codes.rows()[order]
    x, output_gradient = x.to(by_value.dtype), output_gradient.to(by_value.dtype)
    bounds = torch.searchsorted(latents, torch.arange(d_sae + 1, device=latents.device))
    by_bias = torch.zeros(d_sae, dtype=by_value.dtype, device=by_value.device)
    return (
        _bags(rows % max(1, len(x)), x, bounds, by_value[order]),
        _bags(rows, output_gradient, bounds, codes.values[order]),
        by_bias.index_add_(0, codes.indices, by_value),
    )


def firing_counts(codes: RaggedCodes, d_sae: int) -> Tensor:
    counts = torch.zeros(d_sae, dtype=codes.values.dtype, device=codes.values.device)
    return counts.index_add_(0, codes.indices, (codes.values > 0).to(counts.dtype))


def sparse_adam(
    latents: Latents,
    gradients: SparseGradients,
    step: int,
    learning_rate: float,
    raw: RawRows | None = None,
) -> Tensor:
    sums = weight_gradients(gradients, len(latents.encoder))
    if gradients.more is not None:
        gradients.more.add_to(sums)
    if raw is None:
        adam(latents, sums, step, learning_rate)
    else:
        adam_raw(latents, sums, step, learning_rate, raw)
    return sums[2]


def adam(latents: Latents, gradients: Gradients, step: int, learning_rate: float) -> None:
    _move(latents, gradients[:2], step, learning_rate)
    decoder = latents.decoder
    decoder /= torch.linalg.vector_norm(decoder, dim=1, keepdim=True).clamp_(min=SMALLEST_NORM)
    if latents.encoder_fast is not None:
        latents.encoder_fast.copy_(latents.encoder)


def adam_raw(
    latents: Latents, gradients: Gradients, step: int, learning_rate: float, raw: RawRows
) -> None:
    """``adam`` with raw rows."""
    (encoder, decoder), (by_encoder, by_decoder, by_bias) = latents[:2], gradients
    length = raw.lengths[:, None]
    by_length = (by_encoder * encoder).sum(1) + by_bias * raw.bias - (by_decoder * decoder).sum(1)
    by_raw = torch.addcmul(by_decoder, by_length[:, None], decoder).div_(length)
    encoder.div_(length)
    decoder.mul_(length)
    _move(latents, (by_encoder * length, by_raw), step, learning_rate)
    torch.linalg.vector_norm(decoder, dim=1, out=raw.lengths).clamp_(min=SMALLEST_NORM)
    encoder.mul_(length)
    decoder.div_(length)
    if latents.encoder_fast is not None:
        latents.encoder_fast.copy_(encoder)


def _move(
    latents: Latents, gradients: tuple[Tensor, Tensor], step: int, learning_rate: float
) -> None:
    """One step of Adam over encoder and decoder, in place; ``step`` counts from 1."""
    rows = list(latents[:2])
    torch_adam.adam(
        rows,
        list(gradients),
        list(latents[2:4]),
        list(latents[4:6]),
        [],
        [torch.full((), step - 1.0, device=one.device) for one in rows],
        fused=rows[0].device.type in ("cpu", "cuda"),
        amsgrad=False,
        beta1=BETAS[0],
        beta2=BETAS[1],
        lr=learning_rate,
        weight_decay=0.0,
        eps=EPSILON,
        maximize=False,
    )


def _bags(
    indices: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor
) -> Float[Tensor, "bags width"]:
    """For each bag, the weighted sum of the rows it names; 0 for an empty one."""
    return F.embedding_bag(
        indices,
        rows,
        offsets,
        per_sample_weights=weights,
        mode="sum",
        include_last_offset=True,
    )


def _above(product: Product, bound: float | Tensor) -> RaggedCodes:
    pre = product.pre()
    active = pre > bound
    rows, indices = active.nonzero(as_tuple=True)
    values = pre[rows, indices].to(exact_dtype(pre))
    return RaggedCodes(indices, values, offsets_of(active.sum(1)))
