"""Weights in the layout in which oneDNN multiplies, for many passes on a CPU where that is faster.

Where a text is read many times, copies are worth their memory. The products are the same, to
rounding at most.
"""

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_wsae.machine.hardware import memory_of, onednn_is_faster, onednn_layout, onednn_linear
from llm_wsae.model.forward import replace_forward
from llm_wsae.model.spread import device_of, is_spread

_MANY = 256
"""Rows; with fewer, a copy is not worth making."""
_SHARE = 8  # copies take at most one part of this many of the memory


class PrepackedWeights:
    """The linear layers of a Hugging Face model, whose weights are copied while it is open.

    The weights must not change while it is open. It is opened and closed while no pass is running.
    """

    def __init__(self, hf_model: Any):
        self._hf_model = hf_model
        self._copies: dict[tuple[nn.Linear, int | None, int | None], Tensor] | None = None
        self._patches = ExitStack()
        self._openers = 0

    def open(self) -> None:
        """Passes without gradients multiply with copies, made when first needed, where there is
        such a layout and memory for it."""
        self._openers += 1
        layers = prepackable(self._hf_model) if self._openers == 1 else []
        if layers:
            self._copies = {}
        for layer in layers:
            replace_forward(
                self._patches, layer, lambda input, layer=layer: self.product(layer, input)
            )

    def close(self) -> None:
        """Once for each time that it was opened; the last one frees the copies."""
        self._openers -= 1
        if not self._openers:
            self._patches.close()
            self._copies = None

    def product(self, layer: nn.Linear, rows: Tensor, part: slice = slice(None)) -> Tensor:
        """A linear layer, or a part of its outputs: rows [..., in], result [..., outputs]."""
        weight, bias = layer.weight[part], None if layer.bias is None else layer.bias[part]
        copies, many = self._copies, rows.shape[:-1].numel() >= _MANY
        pays = many and onednn_is_faster(weight.dtype) and not torch.is_grad_enabled()
        if copies is None or not pays:
            return F.linear(rows, weight, bias)
        key = layer, part.start, part.stop
        if key not in copies:
            copies[key] = onednn_layout(weight)
        return onednn_linear(rows, copies[key], bias)


def prepackable(hf_model: Any) -> list[nn.Linear]:
    """The layers whose weights are copied: none where oneDNN is not faster, or if all of them take
    too much memory."""
    device = device_of(hf_model)
    if device.type != "cpu" or is_spread(hf_model):
        return []
    layers = [
        one
        for one in hf_model.modules()
        if type(one) is nn.Linear and onednn_is_faster(one.weight.dtype)
    ]
    size = sum(one.weight.nbytes for one in layers)
    return layers if size * _SHARE <= memory_of(device) else []
