"""The sparse operations a training step is made of, in plain torch: any device, any floating type,
differentiable.

Only a few of d_sae latents are active in a row, so everything after the encoder's matrix product
costs that share of its dense form. A sum of few rows is an embedding bag: decoding sums decoder
rows over a row's latents, a weight gradient sums rows over a latent's occurrences.

``backends`` has faster versions of the same names: ``cpu`` in C++ and ``triton`` for CUDA. They may
break ties differently, and add in another order.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim import adam as torch_adam

from llm_wsae.sparse.codes import (
    BETAS,
    EPSILON,
    SMALLEST_NORM,
    Codes,
    Gradients,
    Latents,
    PerDimension,
    PerLatent,
    PerSlot,
    Product,
    RaggedCodes,
    RawRows,
    Reconstruction,
    Rows,
    SlotCapacity,
    SparseGradients,
    SubsetGradients,
    Weights,
    exact_dtype,
    joined,
    keep_slots,
    offsets_of,
)

_FOR_SUMS = (torch.float32,)
_FOR_PRODUCTS = (torch.float32, torch.bfloat16)
_TILE_ROWS = 512  # pre-activations of one tile stay in cache and batch × d_sae is never held
_TILE_LATENTS = 2048
_GROUP = 8  # members of a group in the two-stage selection


def encode_topk(product: Product, k: int) -> Codes:
    """The k largest pre-activations of every row, negative ones set to 0. Values are float32
    whatever the product's dtype, or float64 of float64."""
    if faster := _faster("encode_topk", product, _FOR_PRODUCTS):
        return faster(product, k)
    return topk_of_tiles(product, k)


def topk_of_tiles(product: Product, k: int, rows: int | None = None) -> Codes:
    """``encode_topk`` by ``select_topk``, ``rows`` rows at a time."""
    tiles = [select_topk(tile.pre(), k) for tile in product.tiles(rows or _TILE_ROWS)]
    indices, values = zip(*tiles, strict=True)
    return Codes(torch.cat(indices), torch.cat(values).to(exact_dtype(product.x)).relu_())


def encode_above(
    product: Product, threshold: PerLatent, capacity: SlotCapacity | None = None
) -> RaggedCodes:
    """Every pre-activation above its latent's threshold (≥ 0; in the dtype of the values); meant
    for few of them. With ``capacity`` nothing waits for a GPU, and the codes are complete only if
    ``capacity.enough()`` then says so; if not, call again."""
    if faster := _faster("encode_above", product, _FOR_PRODUCTS):
        return faster(product, threshold, capacity)
    return joined([_above(tile, threshold) for tile in product.tiles(_TILE_ROWS)])


def _above(product: Product, bound: float | Tensor) -> RaggedCodes:
    pre = product.pre()
    active = pre > bound
    rows, indices = active.nonzero(as_tuple=True)
    values = pre[rows, indices].to(exact_dtype(pre))
    return RaggedCodes(indices, values, offsets_of(active.sum(1)))


def encode_batch_topk(
    product: Product,
    k: int,
    guess: float | Float[Tensor, ""],
    kept: Bool[Tensor, " batch"] | None = None,
) -> RaggedCodes:
    """The largest positive pre-activations of the whole batch, k per row; fewer if fewer are > 0.
    Rows that are not ``kept`` have no active latent and do not count.

    ``guess``, the smallest value of the previous step, makes it fast when it is just below the
    smallest value of this step; it never changes the result. Dtypes as in ``encode_topk``.
    """
    if faster := _faster("encode_batch_topk", product, _FOR_PRODUCTS):
        return faster(product, k, guess, kept)
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

    Once enough are held, the smallest of them bounds what later tiles may add, so that candidates
    stay few. The bound starts below the guess; if that was too high still, lower, and then at 0.
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


def exact_values(codes: RaggedCodes, x: Rows, encoder: Weights, bias: PerLatent) -> RaggedCodes:
    """The codes with the values x·encoder[index] + bias[index], summed in ``x``'s float32: the
    product that picked the latents may be in bfloat16, and so may ``encoder``. A slot whose value
    is not positive becomes unused."""
    values = value_gradients(codes, encoder, x) + bias[codes.indices]
    return codes._replace(values=values.relu_().mul_(codes.values > 0))


def select_topk(pre: Float[Tensor, "batch d_sae"], k: int) -> Codes:
    """Exactly the k largest entries of every row, in no particular order, sign kept."""
    if faster := _faster("select_topk", (pre,), _FOR_PRODUCTS):
        return faster(pre, k)
    batch, d_sae = pre.shape
    stride = d_sae // _GROUP
    if d_sae % _GROUP or k >= stride:
        values, indices = pre.topk(k, dim=1, sorted=False)
        return Codes(indices, values)
    # They lie in the k groups with the largest maxima. A group's members stand d_sae / 8 apart, so
    # that its maximum is an elementwise maximum of contiguous runs.
    groups = pre.view(batch, _GROUP, stride).amax(1).topk(k, dim=1, sorted=False).indices
    offsets = torch.arange(0, d_sae, stride, device=pre.device)
    candidates = (groups[:, :, None] + offsets).flatten(1)
    values, chosen = pre.gather(1, candidates).topk(k, dim=1, sorted=False)
    return Codes(candidates.gather(1, chosen), values)


def encode_dead(
    product: Product, dead: Bool[Tensor, " some"] | None, k: int
) -> Float[Tensor, "batch some"]:
    """The k largest positive pre-activations of every row, or more where they tie; others are 0, as
    are latents that are not ``dead`` (None: all are). In the product's dtype."""
    if faster := _faster("encode_dead", product, _FOR_PRODUCTS):
        return faster(product, dead, k)
    active = product.pre().relu_()
    if dead is not None:
        active *= dead
    if k < len(product.encoder):
        active *= active >= select_topk(active, k).values.amin(1, keepdim=True)
    return active


def dead_gradients(
    active: Float[Tensor, "batch some"],
    x: Rows,
    decoder: Float[Tensor, "some d_in"],
    output_gradient: Rows,
    sums: SubsetGradients,
) -> None:
    """Add to ``sums``, which are not rounded, the gradients by the weights of latents with the
    values ``active``: by_latentᵀ · x, activeᵀ · output_gradient and by_latent summed over rows,
    where by_latent is output_gradient · decoderᵀ where a latent is active, else 0."""
    given = (active, x, decoder, output_gradient)
    if faster := _faster("dead_gradients", given, _FOR_PRODUCTS):
        faster(*given, sums)
        return
    by_latent = torch.ops.aten.threshold_backward(output_gradient @ decoder.T, active, 0)
    sums.bias.add_(by_latent.sum(0, dtype=sums.bias.dtype))
    add_products(by_latent, x, sums.encoder)
    add_products(active, output_gradient, sums.decoder)


def add_products(latents: Tensor, rows: Tensor, sums: Tensor) -> None:
    """Add latentsᵀ · rows, which may be rounded, to sums that are not, some latents at a time."""
    for some in (slice(i, i + _TILE_LATENTS) for i in range(0, len(sums), _TILE_LATENTS)):
        sums[some] += latents[:, some].T @ rows


def decode(codes: RaggedCodes, decoder: Weights, bias: PerDimension) -> Rows:
    """Σ_j values_j · decoder[indices_j] + bias, for every row."""
    if faster := _faster("decode", (codes.values, decoder, bias)):
        return faster(codes, decoder, bias)
    return _bags(codes.indices, decoder, codes.offsets, codes.values.to(decoder.dtype)).add_(bias)


def value_gradients(codes: RaggedCodes, decoder: Weights, output_gradient: Rows) -> PerSlot:
    """Gradient of the loss by each active pre-activation: decoder[index] · output_gradient[row], 0
    for an unused slot. Products are summed in float32 even if the decoder is rounded to bfloat16.
    """
    exact = () if decoder.dtype == torch.bfloat16 else (decoder,)
    if faster := _faster("value_gradients", (codes.values, output_gradient, *exact)):
        return faster(codes, decoder, output_gradient)
    decoder, starts = decoder.to(output_gradient.dtype), codes.offsets[:-1]
    gradient = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        output_gradient, decoder, codes.indices, starts, codes.rows(), 0
    )
    return gradient.mul_(codes.values > 0)


def reconstruct(
    codes: RaggedCodes,
    decoder: Weights,
    bias: PerDimension,
    x: Rows,
    row_weights: Float[Tensor, " batch"],
    column_weights: PerDimension,
    fast: torch.dtype,
) -> Reconstruction:
    """``decode``, the residual, its weighted gradient and ``value_gradients``. The gradient is that
    of ½ Σ column_weights · residual², in the dtype ``fast``; the weights may have any dtype."""
    row_weights, column_weights = row_weights.to(x.dtype), column_weights.to(x.dtype)
    target = (decoder, bias, x, row_weights, column_weights)
    if faster := _faster("reconstruct", (codes.values, *target[:3])):
        return faster(codes, target, fast)
    residual = decode(codes, decoder, bias).sub_(x).mul_(row_weights[:, None])
    gradient = residual * column_weights
    by_value = value_gradients(codes, decoder, gradient)
    return Reconstruction(residual, gradient.to(fast), by_value, (residual * gradient).sum(1))


def weight_gradients(gradients: SparseGradients, d_sae: int) -> Gradients:
    """Gradients by encoder, decoder and encoder bias: for each latent, over its occurrences, Σ
    by_value·x[row], Σ values·output_gradient[row] and Σ by_value. ``gradients.more`` is added."""
    codes, x, output_gradient, by_value, more = gradients
    sums: Gradients
    if faster := _faster("weight_gradients", (codes.values, by_value)):
        sums = faster(gradients, d_sae)
    else:
        latents, order = codes.indices.sort(stable=True)
        rows = codes.rows()[order]
        x, output_gradient = x.to(by_value.dtype), output_gradient.to(by_value.dtype)
        bounds = torch.searchsorted(latents, torch.arange(d_sae + 1, device=latents.device))
        by_bias = torch.zeros(d_sae, dtype=by_value.dtype, device=by_value.device)
        sums = (
            _bags(rows % max(1, len(x)), x, bounds, by_value[order]),
            _bags(rows, output_gradient, bounds, codes.values[order]),
            by_bias.index_add_(0, codes.indices, by_value),
        )
    if more is not None:
        more.add_to(sums)
    return sums


def firing_counts(codes: RaggedCodes, d_sae: int) -> PerLatent:
    """How many rows each latent is active in, with a value above 0."""
    counts = torch.zeros(d_sae, dtype=codes.values.dtype, device=codes.values.device)
    return counts.index_add_(0, codes.indices, (codes.values > 0).to(counts.dtype))


def adam(
    latents: Latents,
    gradients: SparseGradients | Gradients,
    step: int,
    learning_rate: float,
    raw: RawRows | None = None,
) -> PerLatent:
    """One step of torch.optim.Adam over encoder and decoder, in place, after which decoder rows
    have norm 1; biases do not move: the gradient by the encoder's is returned. ``step`` counts from
    1.

    With ``raw``, the raw rows v and e move, and with them L, the norm of v, and the rows v/L and
    L·e that are seen. A backend may never hold all gradients.
    """
    weights, now = latents[:6], (step, learning_rate)
    if isinstance(gradients, SparseGradients):
        terms = (gradients.codes.values, gradients.by_value)
        if faster := _faster("sparse_adam", (*terms, *weights)):
            return faster(latents, gradients, *now, raw)
        gradients = weight_gradients(gradients, len(latents.encoder))
    elif raw is None and (faster := _faster("adam", (*weights, *gradients[:2]))):
        return faster(latents, gradients, *now)
    (encoder, decoder), (by_encoder, by_decoder, by_bias) = latents[:2], gradients
    if raw is not None:
        length = raw.lengths[:, None]
        by_length = (by_encoder * encoder).sum(1) + by_bias * raw.bias
        by_length -= (by_decoder * decoder).sum(1)
        by_decoder = torch.addcmul(by_decoder, by_length[:, None], decoder).div_(length)
        by_encoder = by_encoder * length
        encoder.div_(length)
        decoder.mul_(length)
    _move(latents, (by_encoder, by_decoder), *now)
    norms = torch.linalg.vector_norm(decoder, dim=1).clamp_(min=SMALLEST_NORM)
    decoder.div_(norms[:, None])
    if raw is not None:
        raw.lengths.copy_(norms)
        encoder.mul_(norms[:, None])
    if latents.encoder_fast is not None:
        latents.encoder_fast.copy_(encoder)
    return by_bias


def _faster(
    name: str, tensors: tuple[Tensor, ...], dtypes: tuple[torch.dtype, ...] = _FOR_SUMS
) -> Callable[..., Any] | None:
    """A backend's operation of that name, if there is one for such tensors."""
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if differentiated or any(tensor.dtype not in dtypes for tensor in tensors):
        return None
    return getattr(_backend(tensors[0].device.type), name, None)


@cache
def _backend(device: str) -> ModuleType | None:
    """By name, since the backends import from here."""
    if device == "cuda" and find_spec("triton") is not None:
        return import_module("llm_wsae.sparse.backends.triton")
    if device == "cpu":
        cpu = import_module("llm_wsae.sparse.backends.cpu")
        return cpu if cpu.available() else None
    return None


def _bags(indices: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """For each bag, the weighted sum of the rows it names; 0 for an empty one."""
    return F.embedding_bag(
        indices, rows, offsets, per_sample_weights=weights, mode="sum", include_last_offset=True
    )


def adam_vector(
    parameter: Float[Tensor, "*size"],
    gradient: Float[Tensor, "*size"],
    mean: Float[Tensor, "*size"],
    square: Float[Tensor, "*size"],
    step: int,
    learning_rate: float,
) -> None:
    """One step of Adam over a tensor with its moments, in place; ``step`` counts from 1."""
    mean.lerp_(gradient, 1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    root = (square / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON)
    parameter.addcdiv_(mean, root, value=-learning_rate / (1 - BETAS[0] ** step))


def _move(
    latents: Latents, gradients: tuple[Tensor, Tensor], step: int, learning_rate: float
) -> None:
    """One step of Adam over encoder and decoder, in place; ``step`` counts from 1."""
    device = latents.encoder.device
    rows, means, squares = list(latents[:2]), list(latents[2:4]), list(latents[4:6])
    steps = [torch.full((), step - 1.0, device=device) for _ in rows]
    named: dict[str, Any] = {"weight_decay": 0.0, "amsgrad": False, "maximize": False}
    named |= {"lr": learning_rate, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPSILON}
    named["fused"] = device.type in ("cpu", "cuda")
    torch_adam.adam(rows, list(gradients), means, squares, [], steps, **named)
