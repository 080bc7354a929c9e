"""Inputs for the sparse operations, random and adversarial, and the implementations to run them on.

Small integers make every product exact in every dtype, and give many ties. Triton's interpreter
(``TRITON_INTERPRET=1``) is slow: there, cases are small, and one axis is varied at a time.
"""

import os
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import looping
import pytest
import torch
from torch import Tensor

from llm_wsae.sparse import codes, operations
from llm_wsae.sparse.backends import cpu
from llm_wsae.sparse.codes import (
    Latents,
    Product,
    RaggedCodes,
    RawRows,
    SlotCapacity,
    SparseGradients,
    SubsetGradients,
    offsets_of,
)
from llm_wsae.training.architecture import Parameters

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
D_IN = 24
CUT = {
    "cpu": {"_TILE_ROWS": 70, "_BLOCK_BYTES": 70 * 2 * 37, "_FEW": 3},
    "pytorch": {"_TILE_ROWS": 30, "_TILE_LATENTS": 37},
    "triton": {"_TILE_BYTES": 1, "_FEWEST_ROWS": 2, "_PART": 32, "_SLOTS": 4, "_COLUMNS": 16,
               "_SPAN": 4, "_HELD": 128},
}  # fmt: skip

needs_compiler = pytest.mark.skipif(not cpu.available(), reason="there is no C++ compiler")
over = partial(looping.over, one_at_a_time=INTERPRETED)


def using(name: str):
    """Within the block every operation is that of a backend, or of plain torch ("pytorch"); Triton
    is not installed everywhere."""
    backend = None if name == "pytorch" else _backend(name)
    return patch.object(operations, "_backend", lambda device: backend)


def dense(codes: RaggedCodes, slots: Tensor, d_sae: int) -> Tensor:
    """[batch, d_sae]: a number for every slot of the codes, at its row and latent."""
    out = torch.zeros(codes.num_rows, d_sae, dtype=slots.dtype, device=slots.device)
    return out.index_put_((codes.rows(), codes.indices), slots, accumulate=True)


def _backend(name: str) -> ModuleType:
    return import_module(f"llm_wsae.sparse.backends.{name}")


def cut_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tiles so small that small inputs have several."""
    module = operations if name == "pytorch" else _backend(name)
    for size, value in CUT[name].items():
        monkeypatch.setattr(module, size, value)
    monkeypatch.setattr(codes, "_FEWEST", 16)


def of_all(some: SubsetGradients | None, parameters: Parameters) -> Parameters:
    """Gradients by all parameters from those by some latents."""
    gradients = Parameters(*map(torch.zeros_like, parameters))
    if some is not None:
        for gradient, part in zip(gradients, some[1:], strict=False):
            gradient[some.latents] = part
    return gradients


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).double()


def whole(batch: int, d_sae: int, shift: float = 0) -> Product:
    bias = integers(d_sae, seed=2) + shift
    return Product(integers(batch, D_IN), integers(d_sae, D_IN, seed=1), bias)


def _encodings(many: int, some: int, d_sae: int) -> dict[str, Product]:
    """Float64, exact in bfloat16 unless they are ``random``."""
    x, encoder, bias = whole(some, d_sae)
    one_row, one_latent = x[:1].expand(some, -1).clone(), encoder[:1].expand(d_sae, -1).clone()
    with_zeros = whole(some, d_sae)
    with_zeros.x[::3] = 0
    with_zeros.encoder[::5] = 0
    return {
        "whole numbers": whole(many, d_sae),
        "one row": whole(1, d_sae),
        "empty batch": whole(0, d_sae),
        "few latents": whole(some, 3),
        "all negative": whole(some, d_sae, shift=-1000.0),
        "all positive": whole(many, d_sae, shift=100.0),
        "zero rows": with_zeros,
        "all equal": Product(one_row, one_latent, bias * 0 + 9),
        "random": Product(
            random(many, D_IN), random(d_sae, D_IN, seed=1), random(d_sae, seed=2) - 4
        ),
    }


ENCODINGS = _encodings(3, 2, 37) if INTERPRETED else _encodings(300, 40, 160)
if not INTERPRETED:
    ENCODINGS["mostly negative"] = whole(250, 160, shift=-14.0)
    ENCODINGS |= {"odd width": whole(230, 157), "wide": whole(33, 2053)}


class Sums(NamedTuple):
    """Input of the operations on codes, float64."""

    codes: RaggedCodes
    x: Tensor
    decoder: Tensor
    bias: Tensor
    output_gradient: Tensor


def _sums(lengths, d_sae: int, d_in: int = D_IN, unused: float = 0.2, hot: bool = False) -> Sums:
    """Rows of the given lengths; a share of the slots is unused, and ``hot`` latents come often."""
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    generator = torch.Generator().manual_seed(len(lengths) + d_sae)
    chance = torch.ones(d_sae)
    chance[:3] = 1000 if hot else 1
    rows = [torch.multinomial(chance, n, generator=generator) for n in lengths.tolist() if n]
    indices = torch.cat([torch.empty(0, dtype=torch.int64), *rows])
    values = torch.rand(len(indices), generator=generator, dtype=torch.float64)
    values[torch.rand(len(indices), generator=generator) < unused] = 0
    sizes = ((len(lengths), d_in), (d_sae, d_in), (d_in,), (len(lengths), d_in))
    rows = (random(*size, seed=seed) for seed, size in enumerate(sizes, start=3))
    return Sums(RaggedCodes(indices, values, offsets_of(lengths)), *rows)


def _lengths(batch: int, highest: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    lengths = torch.randint(0, highest + 1, (batch,), generator=generator)
    lengths[: batch // 5] = 0  # rows without any slot, the first one too
    return lengths


def _size(many: int, few: int) -> int:
    return few if INTERPRETED else many


SUMS = {
    "ragged": _sums(_lengths(_size(200, 6), _size(40, 9)), _size(160, 17)),
    "all latents": _sums([_size(160, 19)] * _size(30, 2), _size(160, 19)),
    "odd width": _sums(_lengths(_size(90, 6), _size(20, 5)), _size(157, 11), 37),
    "few latents hot": _sums([_size(12, 4)] * _size(300, 12), _size(160, 17), hot=True),
    "nothing used": _sums(_lengths(_size(40, 4), _size(9, 3)), _size(160, 11), unused=2.0),
    "no slots": _sums([0] * 6, 11),
    "empty batch": _sums([], 11),
}
if not INTERPRETED:
    SUMS |= {
        "one a row": _sums([1] * 50, 160),
        "wide": _sums(_lengths(40, 30), 400, 1031),
        "most latents dead": _sums(_lengths(20, 3), 3000),
        "one latent": _sums([1] * 40, 1),
    }


def cast(case: NamedTuple, dtype: torch.dtype, device: str | torch.device = "cpu") -> NamedTuple:
    """The case, and named tuples within it, in another dtype on a device."""

    def one(part):
        if isinstance(part, tuple):
            return type(part)(*map(one, part))
        if part is None:
            return None
        return part.to(device, dtype if part.is_floating_point() else part.dtype, copy=True)

    return type(case)(*map(one, case))


def everything(product: Product, case: Sums, fast: torch.dtype = BF16) -> list[Tensor]:
    """What all operations make of a problem, float32 but for the encoding; some terms are rounded
    to the dtype ``fast``."""
    codes, x, decoder, bias, gradient = case
    columns = torch.ones_like(x[0])
    parts = [*operations.encode_topk(product, 9)]
    parts += operations.encode_above(product, product.bias.float() * 0, SlotCapacity())
    parts += operations.encode_batch_topk(product, 5, 0.0)
    parts.append(operations.encode_dead(product, product.bias > 0, 3))
    parts += operations.reconstruct(codes, decoder, bias, x, x[:, 0], columns, fast)
    by_value = operations.value_gradients(codes, decoder, gradient)
    parts += [by_value, operations.decode(codes, decoder, bias)]
    terms = SparseGradients(codes, x.to(fast), gradient.to(fast), by_value)
    sums = operations.weight_gradients(terms, len(decoder))
    dense = (decoder, decoder, *sums[:2], *sums[:2], decoder.to(fast))
    latents = Latents(*(part.contiguous().abs().clone() for part in dense))
    lengths, all_latents = sums[2].abs() + 1, torch.arange(len(decoder), device=x.device)
    more = terms._replace(more=SubsetGradients(all_latents, *map(torch.clone, sums)))
    parts.append(operations.adam(latents, sums, 3, 0.1))
    parts.append(operations.adam(latents, terms, 4, 0.1))
    parts.append(operations.adam(latents, more, 5, 0.1, RawRows(lengths, sums[2])))
    return [*parts, *sums, *latents, lengths]
