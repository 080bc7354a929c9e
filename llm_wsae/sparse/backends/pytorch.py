"""The sparse operations in plain torch: any device, any floating type, differentiable.

What is a sum of few rows is an embedding bag: decoding sums decoder rows over a row's latents, and
a weight gradient sums rows over a latent's occurrences. Both weight gradients need the occurrences
grouped by latent, so one sort serves both.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam

from llm_wsae.sparse.backends.reference import BETAS, EPSILON, SMALLEST_NORM, Gradients
from llm_wsae.sparse.codes import (
    Codes,
    RaggedCodes,
    RawRows,
    SlotCapacity,
    SparseGradients,
    SubsetGradients,
    joined,
)

_TILE_ROWS = 512  # pre-activations of one tile stay in cache and batch × d_sae is never held
_TILE_LATENTS = 2048
_GROUP = 8  # members of a group in the two-stage selection


_threshold_backward = torch.ops.aten.threshold_backward  # of a ReLU: one pass, no mask


def encode_topk(x: Tensor, encoder: Tensor, bias: Tensor, k: int) -> Codes:
    """See ``operations``."""
    tiles = [select_topk(torch.addmm(bias, rows, encoder.T), k) for rows in x.split(_TILE_ROWS)]
    indices, values = zip(*tiles, strict=True)
    return Codes(torch.cat(indices), torch.cat(values).to(_exact(x)).relu_())


def encode_above(
    x: Tensor,
    encoder: Tensor,
    bias: Tensor,
    threshold: Tensor,
    capacity: SlotCapacity | None = None,
) -> RaggedCodes:
    """See ``operations``. Ignores ``capacity``: the codes have exactly the slots they need."""
    tiles = []
    for rows in x.split(_TILE_ROWS):
        pre = torch.addmm(bias, rows, encoder.T)
        tiles.append(_active(pre, pre > threshold))
    return joined(tiles)


def encode_batch_topk(
    x: Tensor,
    encoder: Tensor,
    bias: Tensor,
    k: int,
    guess: float | Tensor,
    kept: Tensor | None = None,
) -> RaggedCodes:
    """See ``operations``."""

    def above(rows: Tensor, bound: float) -> RaggedCodes:
        pre = torch.addmm(bias, rows, encoder.T)
        return _active(pre, pre > bound)

    def encode(rows: Tensor) -> RaggedCodes:
        wanted = min(k, len(encoder)) * len(rows)
        return largest_of_batch(above, rows.split(_TILE_ROWS), wanted, float(guess))

    return of_kept(encode, x, kept)


def of_kept(encode: Callable[[Tensor], RaggedCodes], x: Tensor, kept: Tensor | None) -> RaggedCodes:
    """The codes of those rows only; the others have no slots."""
    if kept is None or bool(kept.all()):
        return encode(x)
    codes = encode(x[kept])
    kept_before = F.pad(kept.cumsum(0), (1, 0))
    return codes._replace(offsets=codes.offsets[kept_before])


def largest_of_batch(
    above: Callable[[Tensor, float], RaggedCodes],
    tiles: Sequence[Tensor],
    wanted: int,
    guess: float,
) -> RaggedCodes:
    """The ``wanted`` largest positive entries of all tiles, where ``above`` finds a tile's.

    Once that many are held, the smallest of them bounds what later tiles may add, so the candidates
    stay few. The bound starts below the guess; if that was too high still, lower, and then at 0.
    """
    for start in dict.fromkeys(max(0.0, share * guess) for share in (0.9, 0.5, 0.0)):
        bound, held, parts = start, 0, []
        for tile in tiles:
            parts.append(above(tile, bound))
            held += len(parts[-1].indices)
            if held > 2 * wanted:
                parts = [largest(joined(parts), wanted)]
                held = wanted
                bound = float(parts[0].values.min()) if wanted else bound
        if held >= wanted:
            break
    return largest(joined(parts), wanted)


def largest(codes: RaggedCodes, count: int) -> RaggedCodes:
    """The ``count`` largest values of the codes, the first ones where they tie; all if fewer."""
    if len(codes.values) <= count:
        return codes
    smallest = codes.values.topk(count, sorted=False).values.min()
    keep = codes.values > smallest
    ties = (codes.values == smallest).nonzero().flatten()
    keep[ties[: count - int(keep.sum())]] = True
    kept = torch.zeros(len(keep) + 1, dtype=torch.int64, device=keep.device)
    kept[1:] = keep.cumsum(0)
    return RaggedCodes(codes.indices[keep], codes.values[keep], kept[codes.offsets])


def select_topk(pre: Tensor, k: int) -> Codes:
    """See ``operations``.

    Two stages: the k largest entries lie in the k groups with the largest maxima. A group's members
    stand d_sae / 8 apart, so that its maximum is an elementwise maximum of contiguous runs.
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


def encode_dead(x: Tensor, encoder: Tensor, bias: Tensor, dead: Tensor | None, k: int) -> Tensor:
    """See ``operations``."""
    active = torch.addmm(bias, x, encoder.T).relu_()
    if dead is not None:
        active *= dead
    if k < len(encoder):
        active *= active >= active.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    return active


def dead_gradients(
    active: Tensor, x: Tensor, decoder: Tensor, output_gradient: Tensor, sums: SubsetGradients
) -> None:
    """See ``operations``."""
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
    """See ``operations``."""
    return _bags(codes.indices, decoder, codes.offsets, codes.values.to(decoder.dtype)).add_(bias)


def value_gradients(codes: RaggedCodes, decoder: Tensor, output_gradient: Tensor) -> Tensor:
    """See ``operations``."""
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
    """See ``operations``, where ``gradients.more`` is added."""
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
    """See ``operations``."""
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
    """See ``operations``."""
    encoder, decoder = rows
    _adam(rows, gradients, means, squares, step, learning_rate)
    decoder /= torch.linalg.vector_norm(decoder, dim=1, keepdim=True).clamp_(min=SMALLEST_NORM)
    if encoder_fast is not None:
        encoder_fast.copy_(encoder)


def adam_raw_rows(
    rows: tuple[Tensor, Tensor],
    gradients: Gradients,
    means: tuple[Tensor, Tensor],
    squares: tuple[Tensor, Tensor],
    step: int,
    learning_rate: float,
    encoder_fast: Tensor | None,
    raw: RawRows,
) -> None:
    """See ``operations``."""
    (encoder, decoder), (by_encoder, by_decoder, by_bias) = rows, gradients
    length = raw.lengths[:, None]
    by_length = (by_encoder * encoder).sum(1) + by_bias * raw.bias - (by_decoder * decoder).sum(1)
    along = decoder if raw.along is None else raw.along
    by_raw = torch.addcmul(by_decoder, by_length[:, None], along).div_(length)
    encoder.div_(length)
    decoder.mul_(length)
    _adam(rows, (by_encoder * length, by_raw), means, squares, step, learning_rate)
    torch.linalg.vector_norm(decoder, dim=1, out=raw.lengths).clamp_(min=SMALLEST_NORM)
    encoder.mul_(length)
    decoder.div_(length)
    if encoder_fast is not None:
        encoder_fast.copy_(encoder)


def _adam(
    tensors: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    step: int,
    learning_rate: float,
) -> None:
    """One step of Adam over tensors, in place; ``step`` counts from 1."""
    adam(
        list(tensors),
        list(gradients),
        list(means),
        list(squares),
        [],
        [torch.full((), step - 1.0, device=one.device) for one in tensors],
        fused=tensors[0].device.type in ("cpu", "cuda"),
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


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _active(pre: Tensor, active: Tensor) -> RaggedCodes:
    rows, indices = active.nonzero(as_tuple=True)
    offsets = torch.zeros(len(pre) + 1, dtype=torch.int64, device=pre.device)
    torch.cumsum(active.sum(1), 0, out=offsets[1:])
    return RaggedCodes(indices, pre[rows, indices].to(_exact(pre)), offsets)
