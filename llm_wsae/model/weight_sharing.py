"""Copies of a model that share its weights, and TransformerLens' bridge around one.

A bridge rewires the model that it is given: it replaces submodules and forces eager attention. A
live model that a caller passes in belongs to the caller. So both cases work on a copy of the module
structure whose parameters occupy the same memory: there is no second set of weights, and what is
done to one model's structure does not show in the other.
"""

import copy
import warnings
from typing import Any

import torch
from torch import nn


def share_weights(hf_model: nn.Module) -> Any:
    """A copy of the modules, configurations and buffers over the same parameter memory, frozen.

    Changes that the owner makes to the weights in place (an optimiser step) show in the copy.
    """
    memo: dict[int, Any] = {}
    for parameter in hf_model.parameters():
        # A parameter without gradient is shared as the object it is (quantised ones carry more
        # than their memory); the others get a frozen twin over the same memory.
        memo[id(parameter)] = (
            nn.Parameter(parameter.detach(), requires_grad=False)
            if parameter.requires_grad
            else parameter
        )
    return copy.deepcopy(hf_model, memo).eval()


def boot_bridge(hf_model: Any, tokenizer: Any, name: str, device: torch.device) -> Any:
    """TransformerLens' TransformerBridge over a weight-sharing copy of ``hf_model``.

    Needs no network and leaves model and tokenizer unchanged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens.model_bridge import TransformerBridge

        shared = share_weights(hf_model)
        # Models built in process, and some files, do not name the class of their architecture.
        shared.config.architectures = [type(hf_model).__name__]
        return TransformerBridge.boot_transformers(
            name,
            hf_model=shared,
            tokenizer=_offline_tokenizer(tokenizer, name),
            device=str(device),
            dtype=hf_model.dtype,
        )


def _offline_tokenizer(tokenizer: Any, name: str) -> Any:
    """A copy that TransformerLens will not fetch from the Hub again.

    It reloads any tokenizer with a BOS from ``init_kwargs["name_or_path"]`` unless
    ``add_bos_token`` is set. Whether the tokenizer really prepends a BOS it finds out by trying.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.init_kwargs.setdefault("name_or_path", name)
    tokenizer.init_kwargs["add_bos_token"] = True
    return tokenizer
