"""Faster attention, norms, gates and linear layers for a model on a CPU.

Attention: at 128 tokens ``scaled_dot_product_attention`` takes 1.5 to 3.6 times as long in
bfloat16 as two matrix products with a softmax between them. Its bfloat16 scores are float32; here
they are bfloat16, as in transformers' ``eager``. Processors with AMX keep torch's faster kernel.

Norms and gates take one pass of memory each. In bfloat16 they round where transformers does; in
float32 they are equal up to the order of a sum. A module is given the faster forward only if that
finds the same in random rows. It becomes one of a subclass: a forward of its own would keep the
model in memory, and stay behind when it is copied.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_wsae.machine.hardware import memory_of, onednn_is_faster, onednn_layout, onednn_linear
from llm_wsae.model.spread import device_of, is_spread
from llm_wsae.sparse.backends import cpu

ATTENTION = "llm_wsae_short"
LONGEST = 128  # tokens; beyond that it depends on the heads which attention is faster
_TOGETHER = 32  # tokens that attend in one product
_ROWS = 16  # of the comparison
# relative; rounding in another place changes 2e-3 in bfloat16
_SAME = {torch.bfloat16: 5e-4, torch.float32: 2e-6}
_MANY = 256  # rows; with fewer, a copy is not worth making
_SHARE = 8  # copies take at most one part of this many of the memory
_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}
_EPSILONS = ("variance_epsilon", "eps")


def use_short_attention(hf_model: Any) -> None:
    """Let a model have this attention where it is faster; what is long or not plainly causal keeps
    transformers' own."""
    on_cpu = device_of(hf_model).type == "cpu" and hf_model.dtype in _SAME
    is_sdpa = hf_model.config._attn_implementation == "sdpa"
    if on_cpu and is_sdpa and not torch.cpu._is_amx_tile_supported():
        # seconds to import, which who loads no model is spared
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(ATTENTION, short_attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        hf_model.set_attn_implementation(ATTENTION)


def short_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """As transformers calls an attention: query [contexts, heads, tokens, width], key and value
    [contexts, groups of heads, tokens, width]; what comes out is [contexts, tokens, heads,
    width]."""
    contexts, heads, tokens, width = query.shape
    groups, scaling, causal = key.shape[1], options.get("scaling"), options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    is_plain = attention_mask is None and causal and not options.get("dropout")
    is_plain &= key.shape[2] == tokens <= LONGEST and heads % groups == 0
    is_plain &= query.device.type == "cpu"  # parts of a spread model may be elsewhere
    if not is_plain or any(options.get(name) is not None for name in ("position_bias", "softcap")):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query = query * (width**-0.5 if scaling is None else scaling)
    key, value = (one.reshape(contexts * groups, tokens, -1) for one in (key, value))
    mixed = []
    for begin in range(0, tokens, _TOGETHER):  # what comes later is not even multiplied
        end = min(begin + _TOGETHER, tokens)
        # heads that share their keys are one product
        rows = query[:, :, begin:end].reshape(contexts * groups, -1, width)
        scores = torch.bmm(rows, key[:, :end].transpose(1, 2)).view(-1, end - begin, end)
        shares = torch.softmax(scores.add_(_later(begin, end, scores.dtype)), -1)
        of_rows = torch.bmm(shares.view(contexts * groups, -1, end), value[:, :end])
        mixed.append(of_rows.view(contexts, heads, end - begin, -1).transpose(1, 2))
    return torch.cat(mixed, 1), None


@functools.lru_cache(maxsize=8)
def _later(begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """−∞ where a token is later than the one of ``begin`` to ``end`` that attends, else 0."""
    return torch.full((end - begin, end), -torch.inf, dtype=dtype).triu(begin + 1)


def fuse_norms_and_gates(hf_model: Any) -> None:
    """Change the modules of a model that nobody else uses."""
    on_cpu = device_of(hf_model).type == "cpu" and not is_spread(hf_model)
    if not on_cpu or hf_model.dtype not in _SAME or not cpu.available():
        return
    draw = torch.Generator()
    for module in hf_model.modules():
        own = type(module)
        for width, fused in _candidates(module):
            rows = torch.randn(1, _ROWS, width, generator=draw.manual_seed(0)).to(hf_model.dtype)
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


class PrepackedWeights:
    """Copies of the weights of linear layers in the layout in which oneDNN multiplies, where a text
    is read many times. It is opened and closed while no pass is running; the weights must not
    change in between. Products are the same, to rounding at most."""

    def __init__(self, hf_model: Any):
        self._hf_model = hf_model
        self._copies: dict[tuple[nn.Linear, int | None, int | None], Tensor] | None = None
        self._patches = contextlib.ExitStack()
        self._openers = 0

    def open(self) -> None:
        """Passes without gradients multiply with copies, made when first needed, where oneDNN is
        faster with them and all of them take little of the memory."""
        self._openers += 1
        device = device_of(self._hf_model)
        if self._openers > 1 or device.type != "cpu" or is_spread(self._hf_model):
            return
        linear = [one for one in self._hf_model.modules() if type(one) is nn.Linear]
        layers = [one for one in linear if onednn_is_faster(one.weight.dtype)]
        size = sum(one.weight.nbytes for one in layers)
        if not layers or size * _SHARE > memory_of(device):
            return
        self._copies = {}
        for layer in layers:
            replace_forward(self._patches, layer, functools.partial(self.product, layer))

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


def replace_forward(
    patches: contextlib.ExitStack, module: nn.Module, forward: Callable[..., Any]
) -> None:
    """Replace a module's ``forward``, to be restored exactly when the stack closes."""
    before = module.__dict__.get("forward")
    module.forward = forward

    def restore() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    patches.callback(restore)
