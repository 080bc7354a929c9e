"""A common interface to the models that dictionaries can be attached to.

A plain transformers model and a ``LanguageModel`` are hooked at the ends of their blocks, a
TransformerLens bridge at its hook points. The arguments of the module that holds the blocks show
how many tokens are in the cache already and which tokens are padding.

A bridge's users read and change activations by name. So that this works for latents too, a bridge
gets one more hook point for each dictionary, under its SAELens name:
``blocks.9.hook_resid_post.hook_sae_acts_post``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llm_wsae.errors import UsageError
from llm_wsae.model.forward import Blocks, Visit, overwriting
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.loading import check_causal
from llm_wsae.model.module_paths import find_paths, get_module
from llm_wsae.model.site import Site

LATENTS = "hook_sae_acts_post"
_bearers: WeakKeyDictionary[Any, dict[tuple[int, str], list[Any]]] = WeakKeyDictionary()
"""By bridge, all that bear a name of a hook point for latents, the last one on top; at the bottom
what bore it before (None: nothing)."""


class Call(NamedTuple):
    """What one forward pass was called with."""

    cached: int
    """Number of positions that earlier forward passes have read."""
    attention_mask: Tensor | None
    """[contexts, positions], 0 for padding, including the cached positions; None without
    padding."""


@dataclass(frozen=True)
class Target:
    """A model with sites."""

    name: str
    d_model: int
    decoder: nn.Module
    """The module that holds the blocks."""
    check_site: Callable[[Site], None]
    """Raises UsageError if the model has no such site."""
    visiting: Callable[[Mapping[Site, Visit]], AbstractContextManager[None]]
    """A context in which every forward pass gives the visits the stream at their sites and
    continues with what they return."""
    naming: Callable[[Sequence[Site]], AbstractContextManager[Mapping[Site, Any]]]
    """A context in which a bridge has a hook point for the latents at each site, which it yields;
    other models have none."""


def target_of(model: Any) -> Target:
    """The model as a target. Raises UsageError for anything but the three kinds of model."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

    if isinstance(model, TransformerBridge):
        return _bridge(model)
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None:
        check_causal(type(model).__name__, model)
        # Neither copied nor frozen: this very model must be hooked.
        model = LanguageModel(model, None, type(model).__name__)
    if not isinstance(model, LanguageModel):
        raise UsageError(
            f"dictionaries cannot be attached to a {type(model).__name__}; give a "
            "TransformerBridge, a causal language model of transformers, or a LanguageModel"
        )
    decoder = _holder(model.hf_model, model.paths.blocks)
    return Target(
        model.name,
        model.d_model,
        decoder,
        model.check_site,
        model.visiting,
        naming=lambda sites: nullcontext({}),
    )


@contextmanager
def watching(decoder: nn.Module) -> Iterator[list[Call]]:
    """While open, the only entry of the list that it yields is the current forward pass's call."""
    from transformers import Cache

    calls = [Call(0, None)]

    def look(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # By type: the parameter's name changed between versions of transformers.
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        cached = int(caches[0].get_seq_length()) if caches else 0
        calls[0] = Call(cached, _padding(kwargs.get("attention_mask"), cached))

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


def _bridge(bridge: Any) -> Target:
    hf_model = bridge.original_model
    paths = find_paths(hf_model)
    blocks = Blocks(hf_model, paths)
    points = bridge.hook_dict
    name = str(bridge.cfg.model_name or type(hf_model).__name__)

    def check_site(site: Site) -> None:
        site.check(len(blocks))
        if str(site) not in points:
            raise UsageError(f"TransformerLens has no {site} in {name}")

    @contextmanager
    def visiting(visits: Mapping[Site, Visit]) -> Iterator[None]:
        for site in visits:
            if site.point == "mid":
                blocks.check_overwriting(site)
        with ExitStack() as hooks:
            for site, visit in visits.items():
                if site.point == "mid":
                    visit = overwriting(visit)
                _add_hook(hooks, points[str(site)], visit)
            yield

    decoder = _holder(hf_model, paths.blocks)
    return Target(
        name,
        bridge.cfg.d_model,
        decoder,
        check_site,
        visiting,
        naming=lambda sites: _named_points(bridge, sites),
    )


@contextmanager
def _named_points(bridge: Any, sites: Sequence[Site]) -> Iterator[Mapping[Site, Any]]:
    """Hook points for latents where the bridge looks for them. One of the same name is set aside;
    blocks may close in any order.

    TransformerLens 4 looks in its registry, to which nothing can be added officially; 3.9 follows
    the name given to ``add_hook`` along attributes, so the point is also an attribute of the site's
    own point (but not a submodule).
    """
    from transformer_lens.hook_points import HookPoint

    places = [(bridge._hook_registry, f"{site}.{LATENTS}") for site in sites]
    places += [(vars(bridge.hook_dict[str(site)]), LATENTS) for site in sites]
    points = {site: HookPoint() for site in sites}
    for site, point in points.items():
        point.name = f"{site}.{LATENTS}"
    placed = list(zip(places, [*points.values()] * 2, strict=True))
    bearers = _bearers.setdefault(bridge, {})
    for (names, name), point in placed:
        bearers.setdefault((id(names), name), [names.get(name)]).append(point)
        names[name] = point
    try:
        yield points
    finally:
        for (names, name), point in placed:
            bearers[id(names), name].remove(point)
            names[name] = bearers[id(names), name][-1]
            if names[name] is None:
                del names[name], bearers[id(names), name]


def _holder(hf_model: nn.Module, path: str) -> nn.Module:
    holder = get_module(hf_model, path.rpartition(".")[0])
    assert holder is not None
    return holder


def _add_hook(hooks: ExitStack, point: Any, visit: Visit) -> None:
    """Hook one of TransformerLens' hook points so that ``reset_hooks`` spares the hook, and remove
    exactly this hook at the end."""
    point.add_hook(lambda tensor, hook: visit(tensor), is_permanent=True)
    handle = point.fwd_hooks[-1]

    def remove() -> None:
        handle.hook.remove()
        point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]

    hooks.callback(remove)
