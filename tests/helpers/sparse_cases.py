"""Inputs for the sparse operations, random and adversarial, and what must hold of the results.

Small integers make every product exact in every dtype, and give many ties.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from llm_wsae.sparse.backends import cpu
from llm_wsae.sparse.codes import RaggedCodes, SubsetGradients
from llm_wsae.training.parameters import Parameters

D_IN = 24

needs_compiler = pytest.mark.skipif(not cpu.available(), reason="there is no C++ compiler")


def of_all(some: SubsetGradients | None, parameters: Parameters) -> Parameters:
    """Gradients by all parameters from those by some latents."""
    gradients = Parameters(*map(torch.zeros_like, parameters))
    if some is not None:
        for gradient, part in zip(gradients, some[1:], strict=False):
            gradient[some.latents] = part
    return gradients


class Encoding(NamedTuple):
    """Input of the encoding operations, float64, exact in bfloat16 unless it is ``random``."""

    x: Tensor
    encoder: Tensor
    bias: Tensor


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).double()


def whole(batch: int, d_sae: int, shift: float = 0) -> Encoding:
    bias = integers(d_sae, seed=2) + shift
    return Encoding(integers(batch, D_IN), integers(d_sae, D_IN, seed=1), bias)


def _with_zero_rows() -> Encoding:
    x, encoder, bias = whole(70, 160)
    x[::3] = 0
    encoder[::5] = 0
    return Encoding(x, encoder, bias)


def _equal_rows() -> Encoding:
    x, encoder, bias = whole(20, 160)
    return Encoding(x[:1].expand(20, -1).clone(), encoder[:1].expand(160, -1).clone(), bias * 0 + 9)


ENCODINGS: dict[str, Encoding] = {
    "whole numbers": whole(700, 160),
    "one row": whole(1, 160),
    "empty batch": whole(0, 160),
    "odd width": whole(530, 157),
    "wide": whole(33, 2053),
    "few latents": whole(9, 3),
    "all negative": whole(40, 160, shift=-1000.0),
    "mostly negative": whole(600, 160, shift=-14.0),
    "all positive": whole(600, 160, shift=100.0),
    "zero rows": _with_zero_rows(),
    "all equal": _equal_rows(),
    "random": Encoding(random(700, D_IN), random(160, D_IN, seed=1), random(160, seed=2) - 4),
}


class Sums(NamedTuple):
    """Input of the operations on codes, float64."""

    codes: RaggedCodes
    x: Tensor
    decoder: Tensor
    bias: Tensor
    output_gradient: Tensor


def _sums(lengths: Tensor, d_sae: int, d_in: int, unused: float = 0.2, hot: bool = False) -> Sums:
    """Rows of the given lengths; a share of the slots is unused, and ``hot`` latents come often."""
    generator = torch.Generator().manual_seed(len(lengths) + d_sae)
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    offsets[1:] = lengths.cumsum(0)
    chance = torch.ones(d_sae)
    chance[:3] = 1000 if hot else 1
    rows = [torch.multinomial(chance, n, generator=generator) for n in lengths.tolist() if n]
    indices = torch.cat([torch.empty(0, dtype=torch.int64), *rows])
    values = torch.rand(len(indices), generator=generator, dtype=torch.float64)
    values[torch.rand(len(indices), generator=generator) < unused] = 0
    batch = len(lengths)
    return Sums(
        RaggedCodes(indices, values, offsets),
        random(batch, d_in, seed=3),
        random(d_sae, d_in, seed=4),
        random(d_in, seed=5),
        random(batch, d_in, seed=6),
    )


def _lengths(batch: int, highest: int) -> Tensor:
    lengths = torch.randint(
        0, highest + 1, (batch,), generator=torch.Generator().manual_seed(batch)
    )
    lengths[: batch // 5] = 0  # rows without any slot, the first one too
    return lengths


SUMS: dict[str, Sums] = {
    "twelve a row": _sums(torch.full((300,), 12), 160, D_IN),
    "one a row": _sums(torch.full((50,), 1), 160, D_IN),
    "all latents": _sums(torch.full((30,), 160), 160, D_IN),
    "ragged": _sums(_lengths(200, 40), 160, D_IN),
    "odd width": _sums(_lengths(90, 20), 157, 37),
    "wide": _sums(_lengths(40, 30), 400, 1031),
    "most latents dead": _sums(_lengths(20, 3), 3000, D_IN),
    "one latent": _sums(torch.full((40,), 1), 1, D_IN),
    "few latents hot": _sums(torch.full((300,), 12), 160, D_IN, hot=True),
    "nothing used": _sums(_lengths(40, 9), 160, D_IN, unused=2.0),
    "no slots": _sums(torch.zeros(6, dtype=torch.int64), 160, D_IN),
    "empty batch": _sums(torch.zeros(0, dtype=torch.int64), 160, D_IN),
}


def cast(case: NamedTuple, dtype: torch.dtype, device: str | torch.device = "cpu") -> NamedTuple:
    """The case in another dtype, codes and all, on a device."""

    def one(part: Tensor | RaggedCodes) -> Tensor | RaggedCodes:
        if isinstance(part, RaggedCodes):
            return RaggedCodes(*map(one, part))
        return part.to(device, dtype if part.is_floating_point() else part.dtype)

    return type(case)(*map(one, case))
