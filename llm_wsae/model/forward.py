"""Forward passes through the model's own modules: record at sites, stop early, resume at a site.

TransformerLens' map of the architecture, read without booting it, says where the modules are, so
that a site means what it means there. An architecture that it does not know still has a list of
blocks, but no sites inside them.

The model runs as transformers wrote it; only the ends of its blocks are hooked. Every hook and
patch is removed when the call ends, also after an error. To stop, the hook at the last wanted site
raises a private exception. To resume at a site, the blocks before it pass their input through, and
the given activations replace the stream there. At a site beside the stream, in a block, the stream
before that block is needed too.

The stream at ``mid`` is read twice, by the norm before the MLP and by the residual branch around
it. A TransformerLens hook on ``ln2.hook_in`` replaces only the first. Here the stream is
overwritten in place, so that the block's own code computes new + mlp(ln2(new)).

The norm, head and soft caps behind the blocks treat every position and, behind the head, every
token of the vocabulary by itself. So they may be applied to chosen rows only, and on a CPU to a run
of tokens at a time, whose weights and logits stay in the cache.
"""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_wsae.errors import LlmWsaeError
from llm_wsae.machine.threads import parallel_map
from llm_wsae.model.cpu_modules import PrepackedWeights, replace_forward
from llm_wsae.model.site import HOOKS, POINTS, Point, Site
from llm_wsae.model.spread import device_of, is_spread

RUN = 2048  # tokens of the vocabulary in a run
_SAME_LOGITS = 1e-2  # relative; products of other shapes round otherwise
_TOKENS_TOGETHER = 1024  # per forward on a CPU core: their activations stay in its cache

Visit = Callable[[Tensor], Tensor | None]
"""Receives the activations at a site [contexts, positions, d_model]; what it returns replaces
them."""

# Whether the forward pass is one of this module's own, which nobody's visits see: those of other
# ``Blocks`` on the same modules may be open.
_probing: ContextVar[bool] = ContextVar("probing", default=False)


@dataclass(frozen=True)
class ModulePaths:
    """Dotted module paths inside a Hugging Face causal language model."""

    blocks: str  # the ModuleList of transformer blocks
    inside: Mapping[Point, str] = field(default_factory=dict)
    """In a block, the modules whose input is ``mid`` or ``mlp_in``, and whose output is
    ``attn_out`` or ``mlp_out``; those that there are."""
    attention: str | None = None  # in a block, the module that turns ``pre`` into ``mid``
    ln_final: str | None = None  # the norm between the last block and the unembedding, if known
    why_not: Mapping[Point, str] = field(default_factory=dict)
    """Why a point is not inside, as the end of a sentence."""

    @property
    def mid(self) -> str | None:
        """In a block, the module whose input is ``hook_resid_mid``, if any is."""
        return self.inside.get("mid")


class _StopForward(Exception):
    """Raised at the last site; caught in this module."""


class Blocks:
    """The transformer blocks of a Hugging Face model, and access to their sites."""

    def __init__(self, hf_model: nn.Module, paths: ModulePaths):
        blocks = get_module(hf_model, paths.blocks)
        assert isinstance(blocks, nn.ModuleList)
        self._hf_model, self._blocks, self._paths = hf_model, blocks, paths
        self._forms: dict[nn.Module, int] = {}
        self._overwritable: set[Site] = set()
        self._visitors = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def why_not(self, site: Site) -> str | None:
        """Why this block lacks the site, as the end of a sentence; None if it has it."""
        paths, point = [self._paths.inside.get(site.point)], site.point
        if point in ("pre", "post"):
            return None
        if point == "mid":  # an attention, and a norm after it
            paths.append(self._paths.attention)
        if all(path and get_module(self._blocks[site.block], path) is not None for path in paths):
            return None
        return self._paths.why_not.get(point, "this block has no such module")

    def run(self, ids: Tensor) -> Any:
        """One plain forward pass of ``ids [contexts, positions]``; the model's output object."""
        return self._hf_model(input_ids=ids, use_cache=False, return_dict=True)

    def record(
        self,
        ids: Tensor,
        sites: Sequence[Site],
        start: Site | None = None,
        hidden: Tensor | None = None,
        entrance: Tensor | None = None,
    ) -> dict[Site, Tensor]:
        """The activations at ``sites``, perhaps with ``hidden`` at ``start`` and, if that is beside
        the stream, the stream at its ``entrance``. Only blocks from ``start`` to the last site are
        computed. If ``side_by_side``, a few contexts go through at a time."""
        size = max(1, _TOKENS_TOGETHER // max(1, ids.shape[1])) if self.side_by_side else len(ids)
        given = (ids, ids if hidden is None else hidden, ids if entrance is None else entrance)
        parts = list(zip(*(whole.split(size) for whole in given), strict=True))
        own, last = threading.local(), max(sites)  # own: what the pass of a thread takes and finds

        def one_pass(part: tuple[Tensor, ...]) -> dict[Site, Tensor]:
            (some_ids, own.hidden, own.entrance), own.found = part, {}
            with torch.no_grad(), contextlib.suppress(_StopForward):
                self.run(some_ids)
            found: dict[Site, Tensor] = vars(own).pop("found")
            return found

        def record(site: Site, hidden: Tensor) -> None:
            own.found[site] = hidden
            if site == last:
                raise _StopForward

        with contextlib.ExitStack() as hooks:
            if start is not None:
                there = self.entering(start, lambda: own.hidden, lambda: own.entrance)
                hooks.enter_context(there)
            for site in sites:
                self._visit(hooks, site, functools.partial(record, site))
            found = parallel_map(one_pass, parts)
        if len(found) == 1:
            return found[0]
        return {site: torch.cat([part[site] for part in found]) for site in sites}

    @property
    def side_by_side(self) -> bool:
        """Whether forward passes may run in several threads at once: not on a GPU, whose memory
        they would fill; not while visits are open, which see all contexts; not if the model is
        spread, whose weights are fetched for one thread."""
        if self._visitors or is_spread(self._hf_model):
            return False
        return device_of(self._hf_model).type == "cpu"

    @contextlib.contextmanager
    def visiting(self, visits: Sequence[tuple[Site, Visit]]) -> Iterator[None]:
        """While open, forward passes give each visit the activations at its site. Raises as
        ``_check_overwriting`` does."""
        for site, _ in visits:
            self._check_overwriting(site)
        with contextlib.ExitStack() as hooks:
            for site, visit in visits:
                self._replace(hooks, site, visit)
            self._visitors += 1
            try:
                yield
            finally:
                self._visitors -= 1

    def _check_overwriting(self, site: Site) -> None:
        """Check once, on two tokens, that a block's residual branch reads the memory that the norm
        after ``mid`` reads. Raises LlmWsaeError if it does not."""
        if site.point != "mid" or site in self._overwritable:
            return
        outputs: list[Tensor] = []
        block, norm = self._blocks[site.block], self._module(site)

        def disturbed(hidden: Tensor) -> Tensor:
            clean = hidden.clone()
            hidden.add_(1 + hidden.abs().mean())
            return clean  # the norm sees no difference

        with contextlib.ExitStack() as hooks, torch.no_grad():
            handle = block.register_forward_hook(lambda *call: outputs.append(_first(call[2])))
            hooks.callback(handle.remove)
            self._probe()
            _pre_hook(hooks, norm, disturbed)
            self._probe()
        if torch.equal(*outputs):
            raise LlmWsaeError(
                f"in this architecture the stream at {site} cannot be replaced for both of its "
                "readers; use hook_resid_pre or hook_resid_post"
            )
        self._overwritable.add(site)

    @contextlib.contextmanager
    def entering(
        self,
        site: Site,
        given: Callable[[], Tensor],
        entrance: Callable[[], Tensor] | None = None,
    ) -> Iterator[None]:
        """While open, forward passes skip the blocks before ``site`` and resume from what ``given``
        returns in their thread; if it is beside the stream, with ``entrance`` as the stream before
        its block. Raises as ``_check_overwriting`` does."""
        self._learn_forms()
        self._check_overwriting(site)
        skipped = site.block + 1 if site.point == "post" else site.block
        with contextlib.ExitStack() as patches:
            for block in self._blocks[:skipped]:
                through = functools.partial(_pass_through, self._forms[block])
                replace_forward(patches, block, through)
            if not site.is_of_stream and entrance is not None:
                self._replace(patches, site.entrance, lambda _: entrance())
            self._replace(patches, site, lambda _: given())
            yield

    def _module(self, site: Site) -> nn.Module:
        """The module whose input or output is a site."""
        block = self._blocks[site.block]
        path = self._paths.inside.get(site.point)
        return block if path is None else block.get_submodule(path)

    def _replace(self, hooks: contextlib.ExitStack, site: Site, visit: Visit) -> None:
        """Let a visit replace the activations at its site for all that read them."""

        def overwrite(hidden: Tensor) -> None:
            if (new := visit(hidden)) is not None:
                hidden.copy_(new)

        self._visit(hooks, site, overwrite if site.point == "mid" else visit)

    def _visit(self, hooks: contextlib.ExitStack, site: Site, visit: Visit) -> None:
        """Give a visit the activations at its site in every forward pass that is no probe."""

        def shown(hidden: Tensor) -> Tensor | None:
            return None if _probing.get() else visit(hidden)

        def behind(_: nn.Module, args: tuple, output: Any) -> Any:
            new = shown(_first(output))
            return new if new is None or isinstance(output, Tensor) else (new, *output[1:])

        module = self._module(site)
        if site.point in ("post", "attn_out", "mlp_out"):
            hooks.callback(module.register_forward_hook(behind).remove)
        else:
            _pre_hook(hooks, module, shown)

    def _learn_forms(self) -> None:
        """Find out once whether blocks return a tensor (0) or a tuple (its length)."""
        if self._forms:
            return

        def learn(module: nn.Module, args: tuple, output: Any) -> None:
            self._forms[module] = 0 if isinstance(output, Tensor) else len(output)

        with contextlib.ExitStack() as hooks, torch.no_grad():
            for block in self._blocks:
                hooks.callback(block.register_forward_hook(learn).remove)
            self._probe()

    def _probe(self) -> None:
        """A forward pass of two tokens, for the hooks of this module alone."""
        token = _probing.set(True)
        try:
            self.run(torch.zeros(1, 2, dtype=torch.long, device=device_of(self._hf_model)))
        finally:
            _probing.reset(token)


def _pass_through(form: int, *args: Any, **kwargs: Any) -> Any:
    """A block's forward that returns its input in the block's form."""
    hidden = _hidden_of(args, kwargs)
    return hidden if form == 0 else (hidden,) + (None,) * (form - 1)


def _hidden_of(args: tuple, kwargs: dict) -> Tensor:
    """The activations among a module's inputs."""
    return args[0] if args else kwargs["hidden_states"]


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _pre_hook(hooks: contextlib.ExitStack, module: nn.Module, visit: Visit) -> None:
    """Give a visit the stream that enters a module."""

    def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        new = visit(_hidden_of(args, kwargs))
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


# --- From the last block's output to logits


class Unembedding(NamedTuple):
    """What makes logits, in two steps, in any thread if the model is ``side_by_side``."""

    enter: Callable[[Float[Tensor, "rows d_model"]], Tensor]
    """From rows of the last block's output to what the runs take; for as many rows."""
    runs: list[Callable[[Tensor], Float[Tensor, "rows run"]]]
    """The logits of each run of the vocabulary, in its order."""

    def __call__(self, rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows vocab"]:
        """The logits of the whole vocabulary."""
        entered = self.enter(rows)
        return torch.cat([run(entered) for run in self.runs], 1)


class Head:
    """What follows the blocks of a Hugging Face model."""

    def __init__(self, hf_model: Any, blocks: Blocks, weights: PrepackedWeights, d_model: int):
        self._hf_model, self._blocks = hf_model, blocks
        self._weights, self._d_model = weights, d_model
        self._divides: bool | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[Unembedding]:
        """While open, what it yields makes logits."""
        given = threading.local()

        def enter(rows: Tensor) -> Tensor:
            given.rows = rows[:, None]
            return _no_ids(rows)

        last = Site(len(self._blocks) - 1, "post")
        with self._blocks.entering(last, lambda: given.rows):
            whole = Unembedding(
                lambda rows: rows, [lambda rows: self._blocks.run(enter(rows)).logits[:, 0]]
            )
            with contextlib.ExitStack() as patches:
                divided = self._divided(patches, enter)
                if divided is not None and self._divides is None:
                    rows = torch.randn(2, self._d_model, generator=torch.Generator().manual_seed(0))
                    self._divides = _agree(divided, whole, rows.to(self._hf_model.dtype))
                yield divided if divided is not None and self._divides else whole

    def _divided(
        self, patches: contextlib.ExitStack, enter: Callable[[Tensor], Tensor]
    ) -> Unembedding | None:
        """Run by run; None if the head is no plain product or the model may not compute side by
        side.

        The model's own forward makes a run: its trunk answers with what it made of the rows in the
        first step, and its head multiplies with a part of its weights.
        """
        model: Any = self._hf_model
        head, trunk = model.get_output_embeddings(), model.base_model
        is_plain = type(head) is nn.Linear and trunk is not model
        if not is_plain or not self._blocks.side_by_side:
            return None
        asked = threading.local()  # in the thread of a run: what has entered, and its part
        own_trunk = trunk.forward

        def trunk_forward(*args: Any, **kwargs: Any) -> Any:
            entered = getattr(asked, "entered", None)
            return own_trunk(*args, **kwargs) if entered is None else entered

        def head_forward(hidden: Tensor) -> Tensor:
            return self._weights.product(head, hidden, getattr(asked, "part", slice(None)))

        replace_forward(patches, trunk, trunk_forward)
        replace_forward(patches, head, head_forward)

        def enter_trunk(rows: Tensor) -> Any:
            return trunk(input_ids=enter(rows), use_cache=False, return_dict=True)

        def run(part: slice, entered: Any) -> Tensor:
            asked.entered, asked.part = entered, part
            try:
                logits: Tensor = self._blocks.run(_no_ids(entered.last_hidden_state)).logits[:, 0]
            finally:
                del asked.entered, asked.part
            return logits

        bounds = [*range(0, head.out_features, RUN), head.out_features]
        parts = [slice(*ends) for ends in pairwise(bounds)]
        return Unembedding(enter_trunk, [functools.partial(run, part) for part in parts])


def _no_ids(rows: Tensor) -> Tensor:
    """Ids that nothing reads: contexts of one position each."""
    return torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)


def _agree(divided: Unembedding, whole: Unembedding, rows: Tensor) -> bool:
    """Whether runs make the logits of the whole: not if what is behind the head is about certain
    tokens."""
    try:
        found, wanted = divided(rows).float(), whole(rows).float()
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return False
    if found.shape != wanted.shape:
        return False
    apart = (found - wanted).where(found != wanted, 0)  # −∞ in both
    return bool(apart.norm() <= _SAME_LOGITS * wanted[wanted.isfinite()].norm())


# --- Where a model's modules are


def text_config(hf_model: Any) -> Any:
    """The configuration of the language model itself (multimodal models nest it)."""
    return hf_model.config.get_text_config(decoder=True)


def get_module(root: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path, or None."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def find_paths(hf_model: Any) -> ModulePaths:
    """The module paths of a model. Raises LlmWsaeError if TransformerLens does not know the
    architecture and no single list of modules is as long as the model's depth."""
    adapter = _adapter(hf_model)
    modules = adapter.component_mapping if adapter is not None else {}
    blocks = modules.get("blocks")
    # The adapter may describe a class of the same name from other code: check that its paths exist.
    if blocks is None or not isinstance(get_module(hf_model, blocks.name), nn.ModuleList):
        return _guessed_paths(hf_model)
    aliases = blocks.hook_aliases
    if (aliases.get("hook_resid_pre"), aliases.get("hook_resid_post")) != ("hook_in", "hook_out"):
        return _guessed_paths(hf_model)
    ln_final = getattr(modules.get("ln_final"), "name", None)
    inside, why_not = _inside(blocks)
    attention = getattr(blocks.submodules.get("attn"), "name", None)
    return ModulePaths(blocks.name, inside, attention, ln_final, why_not)


def _inside(blocks: Any) -> tuple[dict[Point, str], dict[Point, str]]:
    """Where points are in a block, by TransformerLens' map of it, and why others are not.

    The map names an input or output of a component: ``ln2.hook_in``, ``mlp.out.hook_out``.
    """
    inside: dict[Point, str] = {}
    wanted: tuple[tuple[Point, str], ...] = (
        ("mid", "hook_in"), ("attn_out", "hook_out"), ("mlp_in", "hook_in"), ("mlp_out", "hook_out")
    )  # fmt: skip
    names = {"mlp_in": "mlp.hook_in"}
    for point, end in wanted:
        alias = str(names.get(point) or blocks.hook_aliases.get(HOOKS[point], ""))
        *parts, last = alias.split(".")
        path = _path(blocks, parts)
        if path and last == end:
            inside[point] = path
    why_not: dict[Point, str] = {}
    if "attn" not in blocks.submodules or "mid" not in inside:
        inside.pop("mid", None)
        why = "its blocks run attention and MLP in parallel, so there is no stream between them"
        why_not["mid"] = why
    mlp = blocks.submodules.get("mlp")
    if any(kind.__name__ == "MoEBridge" for kind in type(mlp).__mro__):
        for point in ("mlp_in", "mlp_out"):
            inside.pop(point, None)
            why_not[point] = "its MLPs are mixtures of experts, which is not supported"
    return inside, why_not


def _path(block: Any, parts: Sequence[str]) -> str:
    """The path in a block of a component of TransformerLens' map; empty if it is no module."""
    names, component = [], block
    for part in parts:
        component = component.submodules.get(part)
        if component is None:
            return ""
        names += [component.name] if component.name else []
    return ".".join(names)


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
    return ModulePaths(lists[0], why_not=dict.fromkeys(POINTS, why))
