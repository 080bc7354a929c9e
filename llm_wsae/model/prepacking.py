"""Weights in the layout in which oneDNN multiplies, for many passes on a CPU in bfloat16.

Each product of torch lays its weights out anew, which takes a few per cent of the time of a product
of a thousand rows. Where a text is read many times, copies are worth their memory. The product of a
gated MLP's gate also ends in the activation function: the largest tensors of a block are then read
once less, and rounded once less. Apart from that, the numbers are the same to rounding at most.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_wsae.hardware import memory_of
from llm_wsae.model.forward import replace_forward
from llm_wsae.model.spread import device_of, is_spread

_MANY = 256
"""Rows; with fewer, a copy is not worth making."""
_SHARE = 8  # copies take at most one part of this many of the memory
_ONEDNN = {"SiLU": ("swish", ""), "SiLUActivation": ("swish", ""), "GELUTanh": ("gelu", "tanh")}
"""What oneDNN calls the activation functions of torch and transformers, and their algorithms."""


class _Activation(NamedTuple):
    """What is applied to a layer's outputs."""

    own: Callable[[Tensor], Tensor]
    onednn: tuple[str, str]


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
        gates = _gates(self._hf_model, layers)
        activations = {gate: _Activation(a.forward, _ONEDNN[_name(a)]) for gate, a in gates.items()}
        for layer in layers:
            last = activations.get(layer)
            replace_forward(
                self._patches,
                layer,
                lambda input, layer=layer, last=last: self.product(layer, input, last=last),
            )
        for activation in gates.values():  # the gate applied it
            replace_forward(self._patches, activation, lambda input: input)

    def close(self) -> None:
        """Once for each time that it was opened; the last one frees the copies."""
        self._openers -= 1
        if not self._openers:
            self._patches.close()
            self._copies = None

    def product(
        self,
        layer: nn.Linear,
        rows: Tensor,
        part: slice = slice(None),
        last: _Activation | None = None,
    ) -> Tensor:
        """A linear layer, or a part of its outputs: rows [..., in], result [..., outputs]. ``last``
        is applied to them."""
        weight, bias = layer.weight[part], None if layer.bias is None else layer.bias[part]
        copies, many = self._copies, rows.shape[:-1].numel() >= _MANY
        if copies is None or not many or torch.is_grad_enabled() or weight.dtype != torch.bfloat16:
            outputs = F.linear(rows, weight, bias)
            return outputs if last is None else last.own(outputs)
        key = layer, part.start, part.stop
        if key not in copies:
            copies[key] = torch.ops.mkldnn._reorder_linear_weight(weight)
        name, algorithm = ("none", "") if last is None else last.onednn
        return torch.ops.mkldnn._linear_pointwise(rows, copies[key], bias, name, [], algorithm)


def prepackable(hf_model: Any) -> list[nn.Linear]:
    """The layers whose weights are copied: none where oneDNN has no bfloat16, or if all of them
    take too much memory."""
    device = device_of(hf_model)
    if device.type != "cpu" or is_spread(hf_model) or not _has_layout():
        return []
    layers = [
        one
        for one in hf_model.modules()
        if type(one) is nn.Linear and one.weight.dtype == torch.bfloat16
    ]
    size = sum(one.weight.nbytes for one in layers)
    return layers if size * _SHARE <= memory_of(device) else []


def _gates(hf_model: Any, layers: Sequence[nn.Linear]) -> dict[nn.Linear, nn.Module]:
    """Of the gated MLPs, as transformers writes them, each gate and its activation function."""
    mlps = [module for module in hf_model.modules() if hasattr(module, "act_fn")]
    functions = [mlp.act_fn for mlp in mlps]
    return {
        mlp.gate_proj: mlp.act_fn
        for mlp in mlps
        if _name(mlp.act_fn) in _ONEDNN and functions.count(mlp.act_fn) == 1
        if getattr(mlp, "gate_proj", None) in layers and _is_next(mlp, mlp.gate_proj, mlp.act_fn)
    }


def _is_next(mlp: Any, gate: nn.Linear, function: nn.Module) -> bool:
    """Whether the function takes what comes out of the gate, as it is."""
    passed: list[Tensor] = []
    with ExitStack() as hooks, torch.no_grad():
        out = gate.register_forward_hook(lambda _, args, output: passed.append(output))
        into = function.register_forward_pre_hook(lambda _, args: passed.append(args[0]))
        hooks.callback(out.remove)
        hooks.callback(into.remove)
        mlp(gate.weight[:2])
    return len(passed) == 2 and passed[0] is passed[1]


def _name(module: Any) -> str:
    return type(module).__name__


def _has_layout() -> bool:
    names = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    has_all = all(hasattr(torch.ops.mkldnn, name) for name in names)
    return has_all and torch.ops.mkldnn._is_mkldnn_bf16_supported()
