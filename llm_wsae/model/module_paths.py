"""Where a model's modules are: TransformerLens' map of the architecture, read without booting it.

So a site means what it means there, while the model's own modules run. An architecture that
TransformerLens does not know still has a list of blocks, but no ``hook_resid_mid``.
"""

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from llm_wsae.errors import LlmWsaeError


@dataclass(frozen=True)
class ModulePaths:
    """Dotted module paths inside a Hugging Face causal language model."""

    blocks: str
    """The ModuleList of transformer blocks."""
    mid: str | None = None
    """Inside a block: the module whose input is ``hook_resid_mid``, if there is such a point."""
    attention: str | None = None
    """Inside a block: the module that turns ``pre`` into ``mid``, if there is one."""
    ln_final: str | None = None
    """The norm between the last block and the unembedding, if known."""
    why_no_mid: str = ""
    """Why ``mid`` is None, as the end of a sentence."""


def find_paths(hf_model: nn.Module) -> ModulePaths:
    """The module paths of a model. Raises LlmWsaeError if TransformerLens does not know the
    architecture and no single list of modules is as long as the model's depth."""
    return _transformer_lens_paths(hf_model) or _guessed_paths(hf_model)


def text_config(hf_model: Any) -> Any:
    """The configuration of the language model itself (multimodal models nest it)."""
    return hf_model.config.get_text_config(decoder=True)


def get_module(root: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path, or None."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _transformer_lens_paths(hf_model: Any) -> ModulePaths | None:
    adapter = _adapter(hf_model)
    modules = adapter.component_mapping if adapter is not None else {}
    blocks = modules.get("blocks")
    # The adapter may describe a class of the same name from other code: check that its paths exist.
    if blocks is None or not isinstance(get_module(hf_model, blocks.name), nn.ModuleList):
        return None
    aliases = blocks.hook_aliases
    if (aliases.get("hook_resid_pre"), aliases.get("hook_resid_post")) != ("hook_in", "hook_out"):
        return None
    ln_final = getattr(modules.get("ln_final"), "name", None)
    # TransformerLens maps the name to the input of a submodule of the block: "ln2.hook_in".
    part, _, end = str(aliases.get("hook_resid_mid", "")).rpartition(".")
    own = blocks.submodules
    if part in own and end == "hook_in" and "attn" in own:
        return ModulePaths(blocks.name, own[part].name, own["attn"].name, ln_final)
    why = "its blocks run attention and MLP in parallel, so there is no stream between them"
    return ModulePaths(blocks.name, ln_final=ln_final, why_no_mid=why)


def _adapter(hf_model: Any) -> Any | None:
    """TransformerLens' adapter of this architecture, or None if it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens.factories.architecture_adapter_factory import (
            SUPPORTED_ARCHITECTURES,
            ArchitectureAdapterFactory,
        )
        from transformer_lens.model_bridge.sources._bridge_builder import (
            build_bridge_config_from_hf,
        )

        name = type(hf_model).__name__
        if name not in SUPPORTED_ARCHITECTURES:
            return None
        config = build_bridge_config_from_hf(hf_model.config, name, name, hf_model.dtype)
        return ArchitectureAdapterFactory.select_architecture_adapter(config)


def _guessed_paths(hf_model: Any) -> ModulePaths:
    """The only list of modules as long as the model's depth."""
    depth = getattr(text_config(hf_model), "num_hidden_layers", None)
    lists = [
        path
        for path, module in hf_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if len(lists) != 1:
        raise LlmWsaeError(
            f"cannot find the transformer blocks of {type(hf_model).__name__}: "
            "TransformerLens does not know this architecture, and the module lists of length "
            f"{depth} are: {', '.join(lists) or 'none'}; use a model that TransformerLens supports"
        )
    why = "TransformerLens does not know this architecture; use hook_resid_pre or _post"
    return ModulePaths(lists[0], why_no_mid=why)
