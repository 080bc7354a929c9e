"""Weights in the layout in which oneDNN multiplies, for many passes on a CPU in bfloat16.

Each product of torch lays its weights out anew. Of a thousand rows that takes 3 to 5 % of the time,
and the results are the same, so where a text is read many times the copies are worth their memory.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_wsae.hardware import memory_of
from llm_wsae.model.forward import replace_forward
from llm_wsae.model.spread import device_of, is_spread

_MANY = 256
"""Rows; with fewer, a copy is not worth making."""
_SHARE = 8  # copies take at most one part of this many of the memory


class Packing:
    """Linear layers of a Hugging Face model, whose weights are copied while it is open."""

    def __init__(self, hf_model: Any):
        self._hf_model = hf_model
        self._copies: dict[tuple[nn.Linear, int], Tensor] | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While open, passes without gradients multiply with copies, made when first needed; where
        there is no such layout, or no memory for it, with the weights. They must not change."""
        if self._copies is not None or not _is_worthwhile(self._hf_model):
            yield
            return
        self._copies = {}
        try:
            with ExitStack() as patches:
                for layer in self._hf_model.modules():
                    if type(layer) is nn.Linear:
                        replace_forward(patches, layer, partial(self.product, layer))
                yield
        finally:
            self._copies = None

    def product(self, layer: nn.Linear, rows: Tensor, part: slice = slice(None)) -> Tensor:
        """A linear layer, or a part of its outputs: rows [..., in], result [..., outputs]."""
        weight, bias = layer.weight[part], None if layer.bias is None else layer.bias[part]
        copies = self._copies  # which another thread may take away
        if copies is None or torch.is_grad_enabled() or rows.shape[:-1].numel() < _MANY:
            return F.linear(rows, weight, bias)
        key = layer, part.start or 0
        if key not in copies:
            copies[key] = torch.ops.mkldnn._reorder_linear_weight(weight)
        return torch.ops.mkldnn._linear_pointwise(rows, copies[key], bias, "none", [], "")


def _is_worthwhile(hf_model: Any) -> bool:
    device = device_of(hf_model)
    if device.type != "cpu" or hf_model.dtype != torch.bfloat16 or is_spread(hf_model):
        return False
    layout = ("_reorder_linear_weight", "_linear_pointwise")
    if not all(hasattr(torch.ops.mkldnn, name) for name in layout):
        return False
    size = sum(m.weight.nbytes for m in hf_model.modules() if type(m) is nn.Linear)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and size * _SHARE <= memory_of(device)
