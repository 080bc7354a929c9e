"""Norms and gates of a model on a CPU: one pass of memory each.

transformers computes an RMS norm in six operations or more and the gate of an MLP in two. In
bfloat16 the kernels here round where transformers does; in float32 they are equal up to the order
of a sum. A module is given the faster forward only if that finds the same in random rows. It
becomes one of a subclass: a forward of its own would keep the model in memory, and stay behind when
it is copied.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llm_wsae.model.spread import device_of, is_spread
from llm_wsae.sparse.backends import cpu

_ROWS = 16  # of the comparison
# relative; rounding in another place changes 2e-3 in bfloat16
_SAME = {torch.bfloat16: 5e-4, torch.float32: 2e-6}
_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}
_EPSILONS = ("variance_epsilon", "eps")


def fuse_norms_and_gates(hf_model: Any) -> None:
    """Change the modules of a model that nobody else uses."""
    on_cpu = device_of(hf_model).type == "cpu" and not is_spread(hf_model)
    if not on_cpu or hf_model.dtype not in _SAME or not cpu.available():
        return
    for module in hf_model.modules():
        own = type(module)
        for width, fused in _candidates(module):
            rows = _rows(width, hf_model.dtype)
            wanted = _output(module, rows)
            module.__class__ = fused
            if wanted is not None and _agree(_output(module, rows), wanted):
                break
            module.__class__ = own


def _candidates(module: nn.Module) -> Iterator[tuple[int, type[nn.Module]]]:
    """The width of what a module takes, and what it may become."""
    own: Any = type(module)
    weight = getattr(module, "weight", None)
    if own.__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.ndim == 1:
        epsilon = next((getattr(module, one) for one in _EPSILONS if hasattr(module, one)), None)
        if epsilon is not None and weight.dtype in _SAME:
            yield len(weight), _norm(own, float(epsilon), one_more=False)
            yield len(weight), _norm(own, float(epsilon), one_more=True)
    activation = _ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__)
    parts: list[Any] = [getattr(module, f"{one}_proj", None) for one in ("gate", "up", "down")]
    if activation is not None and all(type(part) is nn.Linear for part in parts):
        yield parts[0].in_features, _gated(own, activation)


@functools.cache
def _norm(own: Any, epsilon: float, one_more: bool) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != self.weight.dtype:
            return own.forward(self, x)
        return cpu.rms_norm(x, self.weight, epsilon, one_more)

    return type(own.__name__, (own,), {"forward": forward, "__module__": __name__})


@functools.cache
def _gated(own: Any, activation: str) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != self.down_proj.weight.dtype:
            return own.forward(self, x)
        return self.down_proj(cpu.gate(activation, self.gate_proj(x), self.up_proj(x)))

    return type(own.__name__, (own,), {"forward": forward, "__module__": __name__})


def _rows(width: int, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(1, _ROWS, width, generator=draw).to(dtype)


@torch.no_grad()
def _output(module: nn.Module, rows: Tensor) -> Tensor | None:
    """What a module makes of rows; None if it takes something else, or makes something else."""
    try:
        found = module(rows)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return None
    return found if isinstance(found, Tensor) and found.shape == rows.shape else None


def _agree(found: Tensor | None, wanted: Tensor) -> bool:
    """Whether they are equal up to rounding."""
    if found is None:
        return False
    most = _SAME[wanted.dtype] * wanted.float().norm()
    return bool((found.float() - wanted.float()).norm() <= most)
