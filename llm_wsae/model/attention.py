"""Causal attention of short contexts on a CPU, faster than torch's own kernel.

At 128 tokens ``scaled_dot_product_attention`` takes 1.5 to 3.6 times as long in bfloat16, and 1.05
to 1.2 times in float32, as two matrix products with a softmax between them. In bfloat16 its scores
are float32; here they are bfloat16, as in transformers' ``eager``: rows of SmolLM2 after block 9
differ from those in float32 by 0.85 % instead of 0.81. Processors with AMX have a faster kernel in
torch and keep it.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llm_wsae.model.spread import device_of

NAME = "llm_wsae_short"
LONGEST = 128
"""Tokens; beyond that it depends on the heads which of the two is faster."""
_TOGETHER = 32  # tokens that attend in one product


def use_short_attention(hf_model: Any) -> None:
    """Let a model have this attention where it is faster; longer contexts, and whatever is not
    plainly causal, keep transformers' own."""
    has_kernel = hf_model.dtype in (torch.float32, torch.bfloat16)
    if device_of(hf_model).type != "cpu" or not has_kernel or torch.cpu._is_amx_tile_supported():
        return
    if hf_model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, short_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    hf_model.set_attn_implementation(NAME)


def short_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Any]:
    """As transformers calls an attention: query [contexts, heads, tokens, width], key and value
    [contexts, groups of heads, tokens, width]; what comes out is [contexts, tokens, heads,
    width]."""
    contexts, heads, tokens, width = query.shape
    groups = key.shape[1]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_plain = attention_mask is None and causal and not dropout and key.shape[2] == tokens
    is_plain &= query.device.type == "cpu"  # parts of a spread model may be elsewhere
    asks_more = any(others.get(name) is not None for name in ("position_bias", "softcap"))
    if not is_plain or asks_more or tokens > LONGEST or heads % groups:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **others,
        )
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
