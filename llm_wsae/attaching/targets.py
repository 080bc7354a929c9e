"""The models that dictionaries can be attached to.

A plain transformers model and a ``LanguageModel`` are hooked at the ends of their blocks, a
TransformerLens bridge at its hook points. The arguments of the module that holds the blocks show
how many tokens are in the cache already and which tokens are padding.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llm_wsae.errors import UsageError
from llm_wsae.model.forward import Blocks, Visit, overwriting
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.loading import check_causal
from llm_wsae.model.module_paths import find_paths
from llm_wsae.model.site import Site

_LATENTS = "hook_sae_acts_post"


class Call(NamedTuple):
    """What one forward pass was called with."""

    cached: int
    """Number of positions that earlier forward passes have read."""
    attention_mask: Tensor | None
    """[contexts, positions], 0 for padding, including the cached positions; None without
    padding."""


class Bridge:
    """A TransformerLens bridge, as far as it is used like a ``LanguageModel`` here."""

    def __init__(self, bridge: Any):
        self._points = bridge.hook_dict
        self._registry = bridge._hook_registry
        self.hf_model = bridge.original_model
        self.paths = find_paths(self.hf_model)
        self.name = str(bridge.cfg.model_name or type(self.hf_model).__name__)
        self.d_model: int = bridge.cfg.d_model
        self._blocks = Blocks(self.hf_model, self.paths)

    def check_site(self, site: Site) -> None:
        """Raises UsageError if the bridge has no such site."""
        site.check(len(self._blocks))
        if str(site) not in self._points:
            raise UsageError(f"TransformerLens has no {site} in {self.name}")

    @contextmanager
    def visiting(self, visits: Mapping[Site, Visit]) -> Iterator[None]:
        """``Blocks.visiting`` at TransformerLens' hook points, whose ``reset_hooks`` spares it."""
        added = []
        for site in visits:
            if site.point == "mid":
                self._blocks.check_overwriting(site)
        try:
            for site, visit in visits.items():
                point = self._points[str(site)]
                visit = overwriting(visit) if site.point == "mid" else visit
                point.add_hook(lambda tensor, hook, visit=visit: visit(tensor), is_permanent=True)
                added.append((point, point.fwd_hooks[-1]))
            yield
        finally:
            for point, handle in added:
                handle.hook.remove()
                point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]

    @contextmanager
    def naming(self, sites: Sequence[Site]) -> Iterator[Mapping[Site, Any]]:
        """While open, a hook point for the latents at each site is where the bridge looks for it.

        TransformerLens 4 looks in its registry, to which nothing can be added officially; 3.9
        follows the name given to ``add_hook`` along attributes, so the point is also an attribute
        of the site's own point (but not a submodule).
        """
        from transformer_lens.hook_points import HookPoint

        points = {site: HookPoint() for site in sites}
        with ExitStack() as names:
            for site, point in points.items():
                point.name = f"{site}.{_LATENTS}"
                names.enter_context(_put(self._registry, point.name, point))
                names.enter_context(_put(vars(self._points[str(site)]), _LATENTS, point))
            yield points


def target_of(model: Any) -> LanguageModel | Bridge:
    """The model as a target. Raises UsageError for anything but the three kinds of model."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

    if isinstance(model, TransformerBridge):
        return Bridge(model)
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None:
        check_causal(type(model).__name__, model)
        # Neither copied nor frozen: this very model must be hooked.
        return LanguageModel(model, None, type(model).__name__)
    if isinstance(model, LanguageModel):
        return model
    raise UsageError(
        f"dictionaries cannot be attached to a {type(model).__name__}; give a TransformerBridge, "
        "a causal language model of transformers, or a LanguageModel"
    )


@contextmanager
def watching(target: LanguageModel | Bridge) -> Iterator[list[Call]]:
    """While open, the only entry of the list that it yields is the current forward pass's call."""
    from transformers import Cache

    calls = [Call(0, None)]

    def look(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # By type: the parameter's name changed between versions of transformers.
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        cached = int(caches[0].get_seq_length()) if caches else 0
        calls[0] = Call(cached, _padding(kwargs.get("attention_mask"), cached))

    decoder = target.hf_model.get_submodule(target.paths.blocks.rpartition(".")[0])
    handle = decoder.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _padding(mask: Any, cached: int) -> Tensor | None:
    """Which tokens are text [contexts, positions], from either form of mask that a decoder takes:
    that, or what each position attends to [contexts, 1, queries, keys] (perhaps one for each kind
    of attention), of which the last position attends to all text."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return None
    if mask.ndim == 2:
        return mask
    seen = mask[:, 0, -1, : cached + mask.shape[2]]
    return seen if seen.dtype == torch.bool else seen == 0  # else it is added to scores


@contextmanager
def _put(names: dict[str, Any], name: str, point: Any) -> Iterator[None]:
    """While open, the point has that name, which then goes back to what had it before."""
    before = names.get(name)
    names[name] = point
    try:
        yield
    finally:
        names[name] = before
        if before is None:
            del names[name]
