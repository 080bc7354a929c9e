"""Forward passes through the model's own modules: record at sites, stop early, resume at a site.

The model runs as transformers wrote it; only the ends of its blocks are hooked. Every hook and
patch is removed when the call ends, also after an error. To stop, the hook at the last wanted site
raises a private exception.

To resume at a site, the blocks before it pass their input through unchanged, and the given
activations enter at the site. ``mid`` needs care: the stream between attention and MLP is read
twice, by the norm before the MLP and by the residual branch around it. A TransformerLens hook on
``ln2.hook_in`` replaces only the first. Here the activation enters as the *block's* input while the
attention is made to contribute zero, so that the block's own code computes new + mlp(ln2(new)).
"""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from llm_wsae.errors import LlmWsaeError
from llm_wsae.machine.threads import parallel_map
from llm_wsae.model.module_paths import ModulePaths, get_module
from llm_wsae.model.site import Site
from llm_wsae.model.spread import device_of, is_spread

_TOKENS_TOGETHER = 1024  # per forward on a CPU core: their activations stay in its cache

Visit = Callable[[Tensor], Tensor | None]
"""Receives the stream at a site [contexts, positions, d_model]; what it returns replaces it."""
_Look = Callable[[tuple, dict], Tensor | None]
_Recorded = dict[int, dict[Site, Tensor]]  # by the thread that a pass runs in

# Whether the forward pass is one of this module's own, of tokens without a meaning, which nobody's
# visits see: those of other ``Blocks`` on the same modules may be open.
_probing: ContextVar[bool] = ContextVar("probing", default=False)


class _StopForward(Exception):
    """Raised at the last site; caught in this module."""


class Blocks:
    """The transformer blocks of a Hugging Face model, and access to their sites."""

    def __init__(self, hf_model: nn.Module, paths: ModulePaths):
        blocks = get_module(hf_model, paths.blocks)
        assert isinstance(blocks, nn.ModuleList)
        self._hf_model, self._blocks = hf_model, blocks
        self._mid, self._attn = paths.mid, paths.attention
        self._forms: dict[nn.Module, int] = {}
        self._visitors = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def has_mid(self, block: int) -> bool:
        """Whether this block has a ``hook_resid_mid``: an attention before it and a norm after
        it."""
        paths, module = (self._mid, self._attn), self._blocks[block]
        return all(path is not None and get_module(module, path) is not None for path in paths)

    def run(self, ids: Tensor) -> Any:
        """One plain forward pass of ``ids [contexts, positions]``; the model's output object."""
        return self._hf_model(input_ids=ids, use_cache=False, return_dict=True)

    def record(self, ids: Tensor, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """The activations at ``sites``; nothing after the last site is computed.

        On a CPU the contexts go through the model in parallel, a few per core; while visits are
        open, all together. No row depends on another context.
        """
        with self.recording(sites, stop=True) as recorded:
            parts = ids.split(self._contexts_together(ids))
            found = parallel_map(lambda part: self._pass(part, recorded), parts)
        if len(found) == 1:
            return found[0]
        return {site: torch.cat([part[site] for part in found]) for site in sites}

    def carry(self, ids: Tensor, start: Site, hidden: Tensor, end: Site) -> Tensor:
        """The stream at ``end`` with ``hidden`` at ``start``; only what lies between is computed,
        as by ``record``."""
        given, size = threading.local(), self._contexts_together(ids)

        def carried(part: tuple[Tensor, Tensor]) -> Tensor:
            given.rows = part[1]
            return self._pass(part[0], recorded)[end]

        with (
            self.entering(start, lambda: given.rows),
            self.recording((end,), stop=True) as recorded,
        ):
            parts = list(zip(ids.split(size), hidden.split(size), strict=True))
            return torch.cat(parallel_map(carried, parts))

    def _pass(self, ids: Tensor, recorded: _Recorded) -> dict[Site, Tensor]:
        with torch.no_grad(), contextlib.suppress(_StopForward):
            self.run(ids)
        return recorded.pop(threading.get_ident())

    @property
    def side_by_side(self) -> bool:
        """Whether forward passes may run in several threads at once: not on a GPU, whose memory
        they would fill; not while visits are open, which see all contexts; not if the model is
        spread, whose weights are fetched for one thread."""
        if self._visitors or is_spread(self._hf_model):
            return False
        return device_of(self._hf_model).type == "cpu"

    def _contexts_together(self, ids: Tensor) -> int:
        """How many contexts go through the model in one forward pass."""
        if not self.side_by_side:
            return len(ids)
        return max(1, _TOKENS_TOGETHER // max(1, ids.shape[1]))

    @contextlib.contextmanager
    def recording(self, sites: Sequence[Site], stop: bool = False) -> Iterator[_Recorded]:
        """While open, forward passes write the activations at ``sites`` into the dict it yields, by
        the thread that they run in. With ``stop`` they end at the last, by a private exception."""
        recorded: _Recorded = defaultdict(dict)
        last = max(sites)

        def recorder(site: Site) -> Visit:
            def record(hidden: Tensor) -> None:
                recorded[threading.get_ident()][site] = hidden
                if stop and site == last:
                    raise _StopForward

            return record

        with contextlib.ExitStack() as hooks:
            for site in sites:
                self._visit(hooks, site, recorder(site))
            yield recorded

    @contextlib.contextmanager
    def visiting(self, visits: Mapping[Site, Visit]) -> Iterator[None]:
        """While open, forward passes give each visit the stream at its site and continue with what
        it returns, or with the unchanged stream if that is None.

        At ``mid`` the stream is overwritten in place, since the block reads it twice. Raises
        LlmWsaeError if that would reach only one of the two readers.
        """
        for site in visits:
            if site.point == "mid":
                self.check_overwriting(site)
        with contextlib.ExitStack() as hooks:
            for site, visit in visits.items():
                self._visit(hooks, site, overwriting(visit) if site.point == "mid" else visit)
            self._visitors += 1
            try:
                yield
            finally:
                self._visitors -= 1

    def check_overwriting(self, site: Site) -> None:
        """Check, on two tokens, that a block's residual branch reads the same memory as the norm
        after ``mid``. Raises LlmWsaeError if it does not.
        """
        outputs: list[Tensor] = []
        block, norm = self._blocks[site.block], self._part(site.block, self._mid)

        def disturbed(args: tuple, kwargs: dict) -> Tensor:
            hidden = _hidden_of(args, kwargs)
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

    @contextlib.contextmanager
    def entering(self, site: Site, given: Callable[[], Tensor]) -> Iterator[None]:
        """While open, forward passes skip all before ``site`` and resume from what ``given``
        returns in their thread."""
        self._learn_forms()
        with contextlib.ExitStack() as patches:
            for block in self._blocks[: site.block]:
                replace_forward(patches, block, self._returning(block, _hidden_of))
            block = self._blocks[site.block]
            if site.point == "post":
                replace_forward(patches, block, self._returning(block, lambda *_: given()))
            else:
                _pre_hook(patches, block, lambda *_: given())
            if site.point == "mid":
                attention = self._part(site.block, self._attn)
                replace_forward(patches, attention, self._returning(attention, _zeros_like(given)))
                _pre_hook(patches, self._part(site.block, self._mid), _same_as(given, site))
            yield

    def _part(self, block: int, path: str | None) -> nn.Module:
        """A part of a block that has a ``mid``."""
        assert path is not None
        return self._blocks[block].get_submodule(path)

    def _visit(self, hooks: contextlib.ExitStack, site: Site, visit: Visit) -> None:
        """Give a visit the stream at its site in every forward pass that is no probe."""

        def shown(hidden: Tensor) -> Tensor | None:
            return None if _probing.get() else visit(hidden)

        def behind(_: nn.Module, args: tuple, output: Any) -> Any:
            new = shown(_first(output))
            return new if new is None or isinstance(output, Tensor) else (new, *output[1:])

        block = self._blocks[site.block]
        if site.point == "post":
            hooks.callback(block.register_forward_hook(behind).remove)
        else:
            module = block if site.point == "pre" else self._part(site.block, self._mid)
            _pre_hook(hooks, module, lambda args, kwargs: shown(_hidden_of(args, kwargs)))

    def _learn_forms(self) -> None:
        """Find out once whether blocks and attentions return a tensor (0) or a tuple (its length):
        a skipped module must return what its caller unpacks."""
        if self._forms:
            return

        def learn(module: nn.Module, args: tuple, output: Any) -> None:
            self._forms[module] = 0 if isinstance(output, Tensor) else len(output)

        attentions = [get_module(block, self._attn) for block in self._blocks] if self._attn else []
        with contextlib.ExitStack() as hooks, torch.no_grad():
            for module in [*self._blocks, *filter(None, attentions)]:
                hooks.callback(module.register_forward_hook(learn).remove)
            self._probe()

    def _probe(self) -> None:
        """A forward pass of two tokens, for the hooks of this module alone."""
        token = _probing.set(True)
        try:
            self.run(torch.zeros(1, 2, dtype=torch.long, device=device_of(self._hf_model)))
        finally:
            _probing.reset(token)

    def _returning(self, module: nn.Module, value: _Look) -> Callable[..., Any]:
        """A forward that computes nothing and returns ``value`` in the module's form."""
        form = self._forms[module]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = value(args, kwargs)
            return hidden if form == 0 else (hidden,) + (None,) * (form - 1)

        return forward


def overwriting(visit: Visit) -> Visit:
    """The visit, with its result written over the stream that it received."""

    def visit_in_place(hidden: Tensor) -> None:
        new = visit(hidden)
        if new is not None:
            hidden.copy_(new)

    return visit_in_place


def _zeros_like(given: Callable[[], Tensor]) -> _Look:
    """Zeros in the place of an attention's output, on the device that it computes on."""
    return lambda args, kwargs: torch.zeros_like(given(), device=_hidden_of(args, kwargs).device)


def _same_as(given: Callable[[], Tensor], site: Site) -> _Look:
    """A guard: the MLP's norm must receive exactly the activation that entered."""

    def check(args: tuple, kwargs: dict) -> None:
        hidden = _hidden_of(args, kwargs)
        if not torch.equal(hidden, given().to(hidden.device)):
            raise LlmWsaeError(
                f"this architecture changes the stream inside the block before {site}, so an "
                "activation cannot be placed there; use hook_resid_pre or hook_resid_post"
            )

    return check


def _hidden_of(args: tuple, kwargs: dict) -> Tensor:
    """The residual stream among a module's inputs."""
    return args[0] if args else kwargs["hidden_states"]


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _pre_hook(hooks: contextlib.ExitStack, module: nn.Module, look: _Look) -> None:
    """Show ``look`` the module's inputs before it runs; a returned tensor replaces the stream."""

    def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        new = look(args, kwargs)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


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
