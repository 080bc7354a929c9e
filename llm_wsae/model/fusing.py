"""Norms and gates of a model on a CPU in bfloat16: one pass of memory each.

transformers computes an RMS norm in six operations or more and the gate of an MLP in two, each of
which reads and writes all numbers, in float32 for the most part. The kernels round where
transformers does, so that nearly all numbers are the same.

A module is given the faster forward only if that finds the same in random rows. Passes with
gradients use its own.
"""

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from llm_wsae.model.spread import device_of, is_spread
from llm_wsae.sparse.backends import cpu

_ROWS = 16  # of the comparison
_SAME = 5e-4  # relative; rounding in another place changes 2e-3
_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}
_EPSILONS = ("variance_epsilon", "eps")


def fuse_norms_and_gates(hf_model: Any) -> None:
    """Change the modules of a model that nobody else uses."""
    on_cpu = device_of(hf_model).type == "cpu" and not is_spread(hf_model)
    if not on_cpu or hf_model.dtype != torch.bfloat16 or not cpu.available():
        return
    for module in hf_model.modules():
        for width, forward in _candidates(module):
            if _agrees(module, MethodType(forward, module), width):
                # bound to its module, so that a copy of the model gets one of its own
                module.forward = MethodType(forward, module)
                break


def _candidates(module: nn.Module) -> Iterator[tuple[int, Callable[..., Tensor]]]:
    """The width of what a module takes, and what may stand in for its forward."""
    weight, kind = getattr(module, "weight", None), type(module).__name__
    if kind.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.ndim == 1:
        epsilon = next((getattr(module, one) for one in _EPSILONS if hasattr(module, one)), None)
        if epsilon is not None and weight.dtype == torch.bfloat16:
            yield len(weight), _norm(epsilon, one_more=False)
            yield len(weight), _norm(epsilon, one_more=True)
    activation = _ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__)
    parts: list[Any] = [getattr(module, f"{one}_proj", None) for one in ("gate", "up", "down")]
    if activation is not None and all(type(part) is nn.Linear for part in parts):
        yield parts[0].in_features, _gated(activation)


def _norm(epsilon: float, one_more: bool) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != torch.bfloat16:
            return type(self).forward(self, x)
        return cpu.rms_norm(x, self.weight, epsilon, one_more)

    return forward


def _gated(activation: str) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != torch.bfloat16:
            return type(self).forward(self, x)
        return self.down_proj(cpu.gate(activation, self.gate_proj(x), self.up_proj(x)))

    return forward


@torch.no_grad()
def _agrees(module: nn.Module, forward: Callable[[Tensor], Tensor], width: int) -> bool:
    """Whether it is the module's own forward, but for rounding."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(1, _ROWS, width, generator=draw).bfloat16()
    try:
        wanted = module(rows)
    except (AttributeError, IndexError, RuntimeError, TypeError):  # it takes something else
        return False
    if not isinstance(wanted, Tensor) or wanted.shape != rows.shape:
        return False
    found = forward(rows)
    return bool((found.float() - wanted.float()).norm() <= _SAME * wanted.float().norm())
