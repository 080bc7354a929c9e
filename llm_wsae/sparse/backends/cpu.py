"""The sparse operations on the CPU, in C++ (``kernels/``): float32, and bfloat16 for products.

The encoder's product is torch's, which uses the hardware's matrix units. It is computed transposed,
a block of latents by a tile of rows, and searched while it is in cache. Everything else is one pass
over the rows or latents concerned. What each operation does is said in ``operations``.

The kernels are built when they are first needed, and kept in the user's cache under a name made of
everything that decides their content. Where they cannot be built, one sentence on stderr says why
and the plain operations take over; so they do, in silence, with LLM_WSAE_NO_COMPILER=1. A library
is code, so it is loaded only from a folder to which nobody else can write.
"""

import ctypes
import hashlib
import math
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from llm_wsae.artifact.files import write_atomic
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.machine.hardware import onednn_is_faster, onednn_linear
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
    joined,
    offsets_of,
)
from llm_wsae.sparse.operations import add_products, largest_of_batch, topk_of_tiles

_TILE_ROWS = 1024  # each tile reads the whole encoder
_BLOCK_BYTES = 1 << 22  # of the product that is searched at once: it stays in cache
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_FEW = 128  # initial capacity of a row's list of candidates
_LARGEST_SHARE = 8  # of the latents a candidate list can hold: beyond d_sae / 8, torch sorts
SOURCES = sorted((Path(__file__).parents[1] / "kernels").iterdir())
_COMPILERS = ("g++", "clang++", "c++")
_COMMON = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_MACHINE = (  # from the fastest to what every compiler takes
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-march=native",),
    (),
)
_NATIVE = ("-march=native", "-###", "-E", "-x", "c++", "/dev/null")  # say what you would do
_LONGEST_SECONDS = 300  # of one compilation
_WAY_OUT = "close it to them (chmod go-w), or set XDG_CACHE_HOME to a folder of yours"


def available() -> bool:
    """Whether the compiled library can be used; it is built on the first call."""
    return _library() is not None


def supports(tensor: Tensor) -> bool:
    """Whether the kernels take such a tensor."""
    return tensor.device.type == "cpu" and tensor.dtype in _NAMES and available()


def encode_topk(product: Product, k: int) -> Codes:
    if k * _LARGEST_SHARE > len(product.encoder):
        return topk_of_tiles(product, k)
    x, encoder, bias = (part.contiguous() for part in product)
    indices, values = torch.empty(len(x), k, dtype=torch.int64), _floats(len(x), k)
    lists, bounds = _Lists(3 * k + 32), _floats(_TILE_ROWS)
    for tile, *found in zip(
        *(part.split(_TILE_ROWS) for part in (x, indices, values)), strict=True
    ):
        for first, block in _blocks(tile, encoder):
            given = (block, bias[first:], *block.shape, first, k, *lists.all(), bounds)
            _call(f"topk_{_NAMES[x.dtype]}", *given)
            del block, given
        _call("finish_topk", len(tile), k, *lists.all(), bounds, *found)
    return Codes(indices, values)


def encode_above(
    product: Product, threshold: Tensor, capacity: SlotCapacity | None = None
) -> RaggedCodes:
    """Ignores ``capacity``: the codes have exactly the slots they need."""
    lists = _Lists(_FEW)
    return joined([lists.above(tile, threshold) for tile in product.tiles(_TILE_ROWS)])


def encode_batch_topk(
    product: Product, k: int, guess: float | Tensor, kept: Tensor | None = None
) -> RaggedCodes:
    lists = _Lists(max(_FEW, 4 * k))

    def above(tile: Product, bound: float) -> RaggedCodes:
        return lists.above(tile, _floats(len(tile.encoder)).fill_(bound))

    return largest_of_batch(above, _TILE_ROWS, product, k, float(guess), kept)


def encode_dead(product: Product, dead: Tensor | None, k: int) -> Tensor:
    active = product.pre()
    dead = None if dead is None else dead.contiguous()
    _call(f"activate_dead_{_NAMES[active.dtype]}", active, dead, *active.shape, k)
    return active


def dead_gradients(
    active: Tensor, x: Tensor, decoder: Tensor, output_gradient: Tensor, sums: SubsetGradients
) -> None:
    by_latent = output_gradient @ decoder.T
    _call(f"mask_dead_{_NAMES[x.dtype]}", active.contiguous(), by_latent, sums.bias, *active.shape)
    add_products(by_latent, x, sums.encoder)
    add_products(active, output_gradient, sums.decoder)


def decode(codes: RaggedCodes, decoder: Tensor, bias: Tensor) -> Tensor:
    out = _floats(codes.num_rows, decoder.shape[1])
    given = (*_checked(codes, len(decoder)), decoder.contiguous(), bias.contiguous())
    _call("decode", *given, out, *out.shape)
    return out


def value_gradients(codes: RaggedCodes, decoder: Tensor, output_gradient: Tensor) -> Tensor:
    out, slots = torch.empty_like(codes.values), _checked(codes, len(decoder))
    given = (decoder.contiguous(), output_gradient.contiguous())
    _call(f"value_gradients_{_NAMES[decoder.dtype]}", *slots, *given, out, *given[1].shape)
    return out


def reconstruct(
    codes: RaggedCodes, target: tuple[Tensor, ...], fast: torch.dtype
) -> Reconstruction:
    decoder, _, x, *_ = target
    slots, given = _checked(codes, len(decoder)), (one.contiguous() for one in target)
    residual, row_errors = _floats(*x.shape), _floats(len(x))
    by_output, by_value = torch.empty(x.shape, dtype=fast), torch.empty_like(slots[1])
    result = Reconstruction(residual, by_output, by_value, row_errors)
    _call(f"reconstruct_{_NAMES[fast]}", *slots, *given, *result, *x.shape)
    return result


def weight_gradients(gradients: SparseGradients, d_sae: int) -> Gradients:
    """Without ``gradients.more``."""
    width = gradients.x.shape[1]
    out = (_floats(d_sae, width), _floats(d_sae, width), _floats(d_sae))
    _call(f"weight_gradients_{_NAMES[gradients.x.dtype]}", *_by_latent(gradients, d_sae), *out)
    return out


def sparse_adam(
    latents: Latents,
    gradients: SparseGradients,
    step: int,
    learning_rate: float,
    raw: RawRows | None = None,
) -> Tensor:
    """A latent's gradients stay in cache: all of them would be nearly as much as Adam's moments."""
    d_sae = len(latents.encoder)
    by_bias = _floats(d_sae)
    empty = torch.empty(0, dtype=torch.int64)
    more = gradients.more or SubsetGradients(empty, *(_floats(0) for _ in range(3)))
    _call(
        f"sparse_adam_{_NAMES[gradients.x.dtype]}",
        *_by_latent(gradients, d_sae),
        more.places(d_sae, torch.int32), *(part.contiguous() for part in more[1:]),
        by_bias, *latents, *(raw or (None, None)), *_rates(step, learning_rate),
    )  # fmt: skip
    return by_bias


def _by_latent(gradients: SparseGradients, d_sae: int) -> tuple[Tensor | int, ...]:
    """The occurrences grouped by latent, as the kernels take them."""
    indices, values, offsets = _checked(gradients.codes, d_sae)
    num_rows, (batch, width) = gradients.codes.num_rows, gradients.x.shape
    assert num_rows == len(gradients.output_gradient) and num_rows % max(1, batch) == 0
    assert batch or not num_rows  # the kernels would look for rows that are not there
    bounds = torch.empty(d_sae + 1, dtype=torch.int64)
    slots, rows = torch.empty(2, len(indices), dtype=torch.int32)
    _call("group_by_latent", indices, offsets, num_rows, d_sae, bounds, slots, rows)
    x, by_value = gradients.x.contiguous(), gradients.by_value.contiguous()
    output_gradient = gradients.output_gradient.to(x.dtype).contiguous()
    return bounds, slots, rows, x, output_gradient, by_value, values, batch, d_sae, width


def adam(latents: Latents, gradients: Gradients, step: int, learning_rate: float) -> Tensor:
    shape, rates = latents.encoder.shape, _rates(step, learning_rate)
    _call("adam_rows", *gradients[:2], *shape, *latents, *rates)
    return gradients[2]


def _rates(step: int, learning_rate: float) -> tuple[float, ...]:
    """Adam's numbers, as the kernels take them."""
    step_size, root_scale = learning_rate / (1 - BETAS[0] ** step), 1 - BETAS[1] ** step
    return step_size, 1 / math.sqrt(root_scale), *BETAS, EPSILON, SMALLEST_NORM


def softmax_sums(
    logits: Tensor, clean: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row of logits [rows, vocab] its maximum m (float32) and Σ exp(logit − m) (float64);
    with ``clean``, other logits of the same dtype and their maxima c, also
    Σ exp(clean − c)·(clean − logit) where clean is not −∞ (float64; otherwise uninitialised)."""
    maxima, sums = _floats(len(logits)), torch.empty(2, len(logits), dtype=torch.float64)
    other, other_maxima = (one.contiguous() for one in clean) if clean else (None, None)
    given = (logits.contiguous(), other, other_maxima, *logits.shape)
    _call(f"softmax_sums_{_NAMES[logits.dtype]}", *given, maxima, *sums)
    return maxima, sums[0], sums[1]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, one_more: bool) -> Tensor:
    """Rows x [..., width] divided by their root mean square, times the weights [width] or, if
    ``one_more``, 1 + weights; all of one dtype, rounded as Llama's norm and Gemma's are."""
    x = x.contiguous()
    out = torch.empty_like(x)
    rows = x.numel() // max(1, len(weight))
    _call(f"rms_norm_{_NAMES[x.dtype]}", x, weight, rows, len(weight), int(one_more), epsilon, out)
    return out


def gate(activation: str, gates: Tensor, values: Tensor) -> Tensor:
    """activation(gates)·values, written over the gates [..., width]; silu or gelu_tanh."""
    rows, width = gates.shape[:-1].numel(), gates.shape[-1]
    _call(f"gate_{activation}_{_NAMES[gates.dtype]}", gates, values, rows, width)
    return gates


class _Lists:
    """The lists of candidates of a tile's rows."""

    def __init__(self, capacity: int):
        self.counts = torch.empty(_TILE_ROWS, dtype=torch.int32)
        self._lengthen(capacity)

    def _lengthen(self, capacity: int) -> None:
        self.capacity = capacity
        self.latents = torch.empty(_TILE_ROWS, capacity, dtype=torch.int32)
        self.values = _floats(_TILE_ROWS, capacity)

    def all(self) -> tuple[int, Tensor, Tensor, Tensor]:
        """As the kernels take them."""
        return self.capacity, self.latents, self.values, self.counts

    def above(self, product: Product, threshold: Tensor) -> RaggedCodes:
        """A tile's entries above their latents' thresholds; lists that are too short grow."""
        tile, encoder, bias = (part.contiguous() for part in product)
        threshold = threshold.float().contiguous()
        while True:
            for first, block in _blocks(tile, encoder):
                given = (block, bias[first:], threshold[first:], *block.shape, first, *self.all())
                _call(f"above_{_NAMES[tile.dtype]}", *given)
                del block, given
            counts = self.counts[: len(tile)]
            longest = int(counts.max()) if len(tile) else 0
            if longest < self.capacity:
                break
            self._lengthen(longest + longest // 4 + 1)
        offsets = offsets_of(counts)
        indices = torch.empty(int(offsets[-1]), dtype=torch.int64)
        values = _floats(len(indices))
        _call("finish_above", len(tile), *self.all()[:3], offsets, indices, values)
        return RaggedCodes(indices, values, offsets)


def _blocks(tile: Tensor, encoder: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The tile's product with the encoder, without bias: (first latent, [latents, rows]). A caller
    that deletes a block before it asks for the next has one in cache."""
    size = max(1, _BLOCK_BYTES // (max(1, len(tile)) * tile.element_size()))
    memory = torch.empty(min(size, len(encoder)) * len(tile), dtype=tile.dtype)
    for first in range(0, len(encoder), size):
        latents = encoder[first : first + size]
        if tile.dtype == torch.float32 and len(tile) and onednn_is_faster(tile.dtype):
            yield first, onednn_linear(latents, tile)
            continue
        product = memory[: len(latents) * len(tile)].view(len(latents), len(tile))
        yield first, torch.mm(latents, tile.T, out=product)


def _floats(*shape: int) -> Tensor:
    """Uninitialised float32 memory, whatever torch's default dtype is."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _checked(codes: RaggedCodes, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """The codes, contiguous. Raises UsageError for a latent that does not exist."""
    indices, values, offsets = (part.contiguous() for part in codes)
    indices, offsets = indices.long(), offsets.long()  # what the kernels read
    assert len(indices) < 1 << 31 and int(offsets[-1]) == len(indices)
    if _call("any_outside", indices, len(indices), d_sae):
        raise UsageError(
            f"the codes name latents from {int(indices.min())} to {int(indices.max())}, but this "
            f"dictionary has {d_sae}, counted from 0"
        )
    return indices, values, offsets


def _call(name: str, *arguments: Tensor | int | float | None) -> int:
    """Call a kernel with pointers to the tensors, and the number of threads last."""
    kernel = getattr(_library(), name)
    return kernel(*map(_argument, arguments), ctypes.c_int64(torch.get_num_threads()))


def _argument(
    value: Tensor | int | float | None,
) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double:
    if isinstance(value, Tensor):
        assert value.is_contiguous() and value.device.type == "cpu"
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


@cache
def _library() -> ctypes.CDLL | None:
    """The kernels, built if they have not been; None where that is not possible."""
    if os.environ.get("LLM_WSAE_NO_COMPILER", "") not in ("", "0"):
        return None
    try:
        return ctypes.CDLL(str(_built()))
    except (LlmWsaeError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        print(
            f"llm_wsae: the fast CPU kernels could not be built ({error}), so the slower ones of "
            "torch are used; LLM_WSAE_NO_COMPILER=1 silences this",
            file=sys.stderr,
        )
        return None


def _built() -> Path:
    """The library in $XDG_CACHE_HOME, if that is an absolute path, else in ~/.cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():
        root = Path.home() / ".cache"  # a RuntimeError for a user without a home
    found = filter(None, map(shutil.which, (os.environ.get("CXX", ""), *_COMPILERS)))
    compiler, folder = next(found, None), root / "llm_wsae" / "kernels"
    if compiler is None:
        raise LlmWsaeError(f"none of {', '.join(_COMPILERS)} is installed")
    # its version, and what "native" is: a home folder may be shared by different machines
    told = subprocess.run([compiler, *_NATIVE], capture_output=True, timeout=60).stderr
    sources = [source.read_bytes() for source in SOURCES]
    decides = repr((sources, compiler, told, _COMMON, _MACHINE))
    target = folder / f"{hashlib.sha256(decides.encode()).hexdigest()[:32]}.so"
    for own in (folder.parent, folder):
        own.mkdir(0o700, parents=True, exist_ok=True)
    _check_private(root, folder.parent, folder)
    # one of another owner was put there while others could write to the folder
    if not target.is_file() or target.stat().st_uid != os.geteuid():
        write_atomic(target, lambda partial: _compile(compiler, partial))
    return target


def _check_private(root: Path, *folders: Path) -> None:
    """Raises LlmWsaeError if somebody else could put a library into a folder, and so run code."""
    for own in folders:
        found = own.stat()
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise LlmWsaeError(f"others can write to {own}; {_WAY_OUT}")
    mode = root.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:  # whoever likes can rename what is in it
        raise LlmWsaeError(f"others can write to {root}; {_WAY_OUT}")


def _compile(compiler: str, target: Path) -> None:
    complaint, files = "", [str(source) for source in SOURCES if source.suffix == ".cpp"]
    for machine in _MACHINE:
        done = subprocess.run(
            [compiler, *_COMMON, *machine, *files, "-o", str(target)],
            capture_output=True,
            text=True,
            timeout=_LONGEST_SECONDS,
        )
        if done.returncode == 0:
            return
        complaint = complaint or next(iter(done.stderr.splitlines()), "no reason given")
    raise LlmWsaeError(f"{compiler} failed: {complaint}")
