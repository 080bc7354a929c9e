"""The sparse operations a training step is made of.

Only a few of d_sae latents are active in a row, so everything after the encoder's matrix product
costs that share of its dense form. Latents are rows here (``[d_sae, d_in]`` for encoder and
decoder), because every operation reads or writes whole latents.

Every operation picks an implementation when it is called, by device, dtype and whether autograd is
on: ``triton`` on CUDA and ``cpu`` on the CPU where they are available and the numbers are float32
(or bfloat16, for the encoder's product), else ``pytorch``. ``using`` overrides the choice.
Ties may be broken differently, and sums added in another order; the tests compare all of them with
a dense reference.

AuxK's two, ``encode_dead`` and ``dead_gradients``, use dense products over the dead latents: those
are few, and up to half as many of them take part in a row as it has dimensions, too many for sparse
codes to be faster.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_wsae.sparse.backends import cpu, pytorch
from llm_wsae.sparse.codes import (
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
)

_forced: ContextVar[ModuleType | None] = ContextVar("implementation", default=None)


@contextmanager
def using(implementation: ModuleType) -> Iterator[None]:
    """Within the block every operation uses this implementation; for tests."""
    before = _forced.set(implementation)
    try:
        yield
    finally:
        _forced.reset(before)


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    k: int,
) -> Codes:
    """The k largest pre-activations x·encoderᵀ + bias of every row, negative ones set to 0.

    ``x``, ``encoder`` and ``bias`` share one dtype, that of the matrix product; values come back in
    float32, or float64 for float64 inputs.
    """
    product = Product(x, encoder, bias)
    return _for_products(*product).encode_topk(product, k)


def encode_above(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"],
    capacity: SlotCapacity | None = None,
) -> RaggedCodes:
    """Every pre-activation above its latent's threshold (≥ 0): 0 is ReLU, a learnt one JumpReLU.

    Dtypes as in ``encode_topk``; the threshold is float32, or float64 for float64 inputs. Memory
    grows with the number of active latents: meant for few of them.

    With ``capacity`` nothing waits for the device, and the codes are complete only if
    ``capacity.enough()`` then says so; if not, call again.
    """
    product = Product(x, encoder, bias)
    return _for_products(*product).encode_above(product, threshold, capacity)


def encode_batch_topk(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    k: int,
    guess: float | Float[Tensor, ""],
    kept: Bool[Tensor, " batch"] | None = None,
) -> RaggedCodes:
    """The largest positive pre-activations of the whole batch, k per row; fewer if fewer are > 0.

    Rows that are not ``kept`` have no active latent and do not count; by default all are kept.
    ``guess``, the smallest value of the previous step, makes it fast when it is just below the
    smallest value of this step; it never changes the result. Dtypes as in ``encode_topk``.
    """
    product = Product(x, encoder, bias)
    return _for_products(*product).encode_batch_topk(product, k, guess, kept)


def exact_values(
    codes: RaggedCodes,
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
) -> RaggedCodes:
    """The codes with the values x·encoder[index] + bias[index], summed in ``x``'s float32.

    The product that picked the latents rounds them, if it is in bfloat16; ``encoder`` still may be.
    Unused slots stay unused, and a slot whose value is not positive becomes unused.
    """
    values = value_gradients(codes, encoder, x) + bias[codes.indices]
    return codes._replace(values=values.relu_().mul_(codes.values > 0))


def select_topk(pre: Float[Tensor, "batch d_sae"], k: int) -> Codes:
    """Exactly the k largest entries of every row, in no particular order, sign kept."""
    return _for_products(pre).select_topk(pre, k)


def encode_dead(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "some d_in"],
    bias: Float[Tensor, " some"],
    dead: Bool[Tensor, " some"] | None,
    k: int,
) -> Float[Tensor, "batch some"]:
    """The k largest positive pre-activations of every row, or more where they tie; others are 0.

    Latents that are not ``dead`` are 0 in all rows; None says that all are dead. In the dtype of
    ``x``, ``encoder`` and ``bias``, for the products that follow.
    """
    product = Product(x, encoder, bias)
    return _for_products(*product).encode_dead(product, dead, k)


def dead_gradients(
    active: Float[Tensor, "batch some"],
    x: Float[Tensor, "batch d_in"],
    decoder: Float[Tensor, "some d_in"],
    output_gradient: Float[Tensor, "batch d_in"],
    sums: SubsetGradients,
) -> None:
    """Add to ``sums`` the gradients by the weights of latents with the values ``active``.

    With by_latent = output_gradient · decoderᵀ where a latent is active, else 0, these are
    by_latentᵀ · x, activeᵀ · output_gradient and by_latent summed over rows. All inputs share one
    dtype, that of the products; the sums are float32, or float64 for float64 inputs.
    """
    given = (active, x, decoder, output_gradient)
    _for_products(*given).dead_gradients(*given, sums)


def decode(
    codes: RaggedCodes, decoder: Float[Tensor, "d_sae d_in"], bias: Float[Tensor, " d_in"]
) -> Float[Tensor, "batch d_in"]:
    """Σ_j values_j · decoder[indices_j] + bias, for every row."""
    return _for_sums(codes.values, decoder, bias).decode(codes, decoder, bias)


def value_gradients(
    codes: RaggedCodes,
    decoder: Float[Tensor, "d_sae d_in"],
    output_gradient: Float[Tensor, "batch d_in"],
) -> Float[Tensor, " active"]:
    """Gradient of the loss by each active pre-activation: decoder[index] · output_gradient[row].

    0 where the value is 0: an unused slot was clipped by the ReLU and must not move any weight.
    Products are summed in float32 even if the decoder is rounded to bfloat16.
    """
    exact = () if decoder.dtype == torch.bfloat16 else (decoder,)
    implementation = _for_sums(codes.values, output_gradient, *exact)
    return implementation.value_gradients(codes, decoder, output_gradient)


def reconstruct(
    codes: RaggedCodes,
    decoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_in"],
    x: Float[Tensor, "batch d_in"],
    row_weights: Float[Tensor, " batch"],
    column_weights: Float[Tensor, " d_in"],
    fast: torch.dtype,
) -> Reconstruction:
    """``decode``, the residual, its weighted gradient and ``value_gradients``.

    The gradient is that of ½ Σ column_weights · residual², in the dtype ``fast``; the weights may
    have any dtype. An implementation may do it all in one pass over the rows.
    """
    target = Target(decoder, bias, x, row_weights.to(x.dtype), column_weights.to(x.dtype))
    return _for_sums(codes.values, decoder, bias, x).reconstruct(codes, target, fast)


def weight_gradients(gradients: SparseGradients, d_sae: int) -> Gradients:
    """Gradients by encoder, decoder and encoder bias, from one grouping of the slots by latent.

    For each latent, over its occurrences: Σ by_value·x[row], Σ values·output_gradient[row] and
    Σ by_value; 0 for one that never occurs. ``gradients.more`` is added.
    """
    implementation = _for_sums(gradients.codes.values, gradients.by_value)
    sums: Gradients = implementation.weight_gradients(gradients, d_sae)
    if gradients.more is not None:
        gradients.more.add_to(sums)
    return sums


def firing_counts(codes: RaggedCodes, d_sae: int) -> Float[Tensor, " d_sae"]:
    """How many rows each latent is active in, with a value above 0."""
    return _for_sums(codes.values).firing_counts(codes, d_sae)


def adam(
    latents: Latents,
    gradients: SparseGradients | Gradients,
    step: int,
    learning_rate: float,
    raw: RawRows | None = None,
) -> Float[Tensor, " d_sae"]:
    """One step of Adam over encoder and decoder, in place, after which decoder rows have norm 1.

    ``step`` counts from 1; the result is that of torch.optim.Adam with ``codes.BETAS`` and
    ``codes.EPSILON``. With ``raw``, the raw rows v and e move, and with them L, the norm of v, and
    the rows v/L and L·e that are seen. Biases do not move: the gradient by the encoder's is
    returned.

    An implementation may sum a latent's sparse gradients where they are used and never hold all of
    them. Raw rows whose gradients are dense are moved by plain torch on every device.
    """
    weights = latents[:6]
    if isinstance(gradients, SparseGradients):
        implementation = _for_sums(gradients.codes.values, gradients.by_value, *weights)
        return implementation.sparse_adam(latents, gradients, step, learning_rate, raw)
    if raw is not None:
        pytorch.adam_raw(latents, gradients, step, learning_rate, raw)
    else:
        _for_sums(*weights, *gradients[:2]).adam(latents, gradients, step, learning_rate)
    return gradients[2]


def _for_products(*tensors: Tensor) -> ModuleType:
    return _implementation(tensors, (torch.float32, torch.bfloat16))


def _for_sums(*tensors: Tensor) -> ModuleType:
    return _implementation(tensors, (torch.float32,))


def _implementation(tensors: tuple[Tensor, ...], fast: tuple[torch.dtype, ...]) -> ModuleType:
    if (forced := _forced.get()) is not None:
        return forced
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if differentiated or any(tensor.dtype not in fast for tensor in tensors):
        return pytorch
    device = tensors[0].device.type
    if device == "cuda" and _triton_is_there():
        from llm_wsae.sparse.backends.triton import operations as triton

        return triton
    return cpu if device == "cpu" and cpu.available() else pytorch


@cache
def _triton_is_there() -> bool:
    return find_spec("triton") is not None
