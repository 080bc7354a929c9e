"""Dictionaries inside a running model, as a context manager::

    with attach(model, dictionary) as attached:
        attached.edit(dictionary.site, Steer(latent=123, strength=8.0))
        ids = model.generate(ids, max_new_tokens=40)

While the block is open, the stream x at the dictionary's site is split, x = x̂ + error with
x̂ = latents · W_dec + b_dec, the latents are edited, and the stream is recombined. With the error,
only the difference that the edits make is added to x, so that a model with a dictionary and no edit
computes exactly the numbers of the model alone.

Rows that the dictionary's training excluded keep the model's stream, as in ``evaluate``, and have
no latents: massive activations, padding, and the first positions of a context, or with ``keep`` the
positions that it excludes.

An edit maps the activations of some latents [rows, latents] to new ones, token by token. For every
unit that a latent gains, its decoder row is added to the stream once. ``latent`` is one latent or
several; duplicates count once. ``positions`` are those of the token ids, generated ones included,
counted from the first: ``slice(ids.shape[1], None)`` is what is generated after ``ids``. None: all.

In a bridge the latents also have a name, ``<site>.hook_sae_acts_post`` as in SAELens, for
``run_with_cache``, ``run_with_hooks`` and ``add_hook``: all latents [contexts, positions, d_sae],
edits included. The model continues with what a hook makes of them.
"""

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, SupportsIndex

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_wsae.attaching.targets import Bridge, Call, target_of, watching
from llm_wsae.data.config import PackConfig
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.model.site import Site
from llm_wsae.sparse.codes import Codes

Latents = SupportsIndex | Iterable[SupportsIndex]
"""A number (also of numpy or torch), or several."""
Function = Callable[[Tensor], Tensor | None]
"""Receives all latents [contexts, positions, d_sae]; what it returns replaces them."""


@dataclass(frozen=True)
class Ablate:
    """Set the activations of latents to 0."""

    latent: Latents
    positions: slice | None = None

    def change(self, values: Tensor) -> Tensor:
        """The new activations."""
        return values * 0


@dataclass(frozen=True)
class Clamp:
    """Set latents to a value, whether or not they fire."""

    latent: Latents
    value: float
    """Their activation."""
    positions: slice | None = None

    def change(self, values: Tensor) -> Tensor:
        """The new activations."""
        return values * 0 + self.value


@dataclass(frozen=True)
class Scale:
    """Multiply the activations of latents."""

    latent: Latents
    factor: float
    positions: slice | None = None

    def change(self, values: Tensor) -> Tensor:
        """The new activations."""
        return values * self.factor


@dataclass(frozen=True)
class Steer:
    """Move the stream along latents' decoder directions: adds a constant to their activations."""

    latent: Latents
    strength: float
    """In units of the latent's activation: ``strength`` times the decoder row is added; negative
    values move the other way."""
    positions: slice | None = None

    def change(self, values: Tensor) -> Tensor:
        """The new activations."""
        return values + self.strength


Edit = Ablate | Clamp | Scale | Steer


class _Splice:
    """A dictionary with its edits, at a site of a running model: from the stream to latents,
    through the edits, and back."""

    def __init__(self, dictionary: Dictionary):
        self.dictionary = dictionary
        self.edits: list[Edit | Function] = []
        self.codes: Codes | None = None
        """Those of the last forward pass, edited [contexts, positions, slots]; all 0 where the
        stream was not changed."""
        self.point: Any = None
        """A bridge's hook point for the latents, which sees and changes them last."""
        self._first = PackConfig.remembered(dictionary.info.store.get("packing")).drop_positions

    def check(self, edit: Edit | Function) -> None:
        if not isinstance(edit, Edit):
            return
        where = edit.positions or slice(None)
        if (where.start or 0) < 0 or (where.stop or 0) < 0:  # which would move while generating
            raise UsageError(
                f"positions are counted from the first token, so {where.start}:{where.stop} is "
                "impossible; give numbers from 0 on"
            )
        if where.step is not None and where.step < 1:
            raise UsageError(f"positions cannot have a step of {where.step}; give at least 1")
        for latent in _latents(edit):
            if not 0 <= latent < self.dictionary.d_sae:
                raise UsageError(
                    f"there is no latent {latent}; the dictionary for {self.dictionary.site} has "
                    f"latents 0 to {self.dictionary.d_sae - 1}"
                )

    def visit(
        self,
        hidden: Tensor,
        call: Call,
        keep: Tensor | None,
        error: bool,
    ) -> Tensor | None:
        """The stream to continue with [contexts, positions, d_in]; None leaves it unchanged."""
        if self.dictionary.W_enc.device != hidden.device:  # blocks may be on several devices
            self.dictionary = copy.deepcopy(self.dictionary).to(hidden.device)
        rows = self._rows(hidden, call, keep)
        x = hidden[rows]
        codes = self.dictionary.encode_sparse(x)
        edits = [*self.edits]
        if self.point is not None and self.point.has_hooks():
            edits.append(self.point)
        base = x if error else self.dictionary.decode(codes)
        positions = torch.arange(hidden.shape[1], device=hidden.device) + call.cached
        change = torch.zeros(x.shape, dtype=self.dictionary.W_dec.dtype, device=x.device)
        for edit in edits:
            if isinstance(edit, Edit):
                where = torch.zeros(call.cached + hidden.shape[1], dtype=torch.bool)
                where[edit.positions or slice(None)] = True
                here = where.to(hidden.device)[positions].expand(rows.shape)[rows]
                codes, moved = self._edited(codes, edit, here)
            else:
                codes, moved = self._mapped(codes, edit, rows)
            change = change + moved
        self.codes = _spread(codes, rows)
        if error and not edits:
            return None
        return hidden.clone().masked_scatter(rows[..., None], (base + change).to(hidden.dtype))

    @torch.no_grad()
    def _rows(self, hidden: Tensor, call: Call, keep: Tensor | None) -> Tensor:
        """Mask of the rows that are explained [contexts, positions]."""
        if hidden.ndim != 3:
            raise LlmWsaeError(
                f"the stream at {self.dictionary.site} is a tensor of shape "
                f"{tuple(hidden.shape)}, not one vector per token; this architecture is not "
                "supported"
            )
        contexts, length = hidden.shape[:2]
        stop = call.cached + length
        mask = torch.ones(contexts, stop, dtype=torch.bool, device=hidden.device)
        if call.attention_mask is not None and call.attention_mask.shape == mask.shape:
            mask = call.attention_mask.to(hidden.device).bool()
        if keep is None:
            rows = mask & (mask.cumsum(1) > self._first)
        elif len(keep) != contexts:
            raise UsageError(
                f"keep is for {len(keep)} contexts, but the model was given {contexts}"
            )
        else:
            known = keep[:, :stop].to(hidden.device).bool()
            rows = torch.nn.functional.pad(known, (0, stop - known.shape[1]), value=True) & mask
        rows = rows[:, call.cached :]
        threshold = self.dictionary.info.massive_threshold
        return rows if threshold is None else rows & ~(hidden.float().norm(dim=2) > threshold)

    def _edited(self, codes: Codes, edit: Edit, where: Tensor) -> tuple[Codes, Tensor]:
        """The codes after an edit of latents ``where`` rows are True, and the change of rows."""
        latents = torch.tensor(_latents(edit), dtype=torch.long, device=codes.indices.device)
        column = latents.new_full((self.dictionary.d_sae,), len(latents))
        column[latents] = torch.arange(len(latents), device=latents.device)
        slot = column[codes.indices]
        # the last column is for all other latents
        before = codes.values.new_zeros(len(codes.values), len(latents) + 1)
        before = before.scatter_add(1, slot, codes.values)[:, :-1]
        after = torch.where(where[:, None], edit.change(before), before)
        others = codes.values.where(slot == len(latents), 0.0)
        new = Codes(
            torch.cat([codes.indices, latents.expand(len(before), -1)], 1),
            torch.cat([others, after], 1),
        )
        return new, (after - before) @ self.dictionary.W_dec[latents]

    def _mapped(self, codes: Codes, function: Function, rows: Tensor) -> tuple[Codes, Tensor]:
        """The codes after a function of all latents, and the change of rows."""
        before = codes.values.new_zeros(len(codes.values), self.dictionary.d_sae)
        before = before.scatter_add(1, codes.indices, codes.values)
        shown = before.new_zeros(*rows.shape, self.dictionary.d_sae)
        shown = shown.masked_scatter(rows[..., None], before)
        returned = function(shown)
        found = shown if returned is None else returned
        if found.shape != shown.shape:
            raise UsageError(
                f"a function of latents {list(shown.shape)} returned {list(found.shape)}"
            )
        after = found[rows]
        if found is shown and torch.equal(after, before):  # it only read them
            return codes, before.new_zeros(())
        width = max(1, int((after != 0).sum(1).max())) if len(after) else 1
        indices = after.detach().abs().topk(width, dim=1).indices
        return Codes(indices, after.gather(1, indices)), (after - before) @ self.dictionary.W_dec


def _latents(edit: Edit) -> list[int]:
    """The latents of an edit, each once."""
    latent: Any = edit.latent  # one or several: arrays are both types, so only trying tells
    try:
        return [operator.index(latent)]
    except TypeError:
        return list(dict.fromkeys(map(operator.index, latent)))


def _spread(codes: Codes, rows: Tensor) -> Codes:
    """The codes of ``rows`` placed in [contexts, positions, slots], 0 elsewhere."""
    width = codes.indices.shape[1]
    indices = codes.indices.new_zeros(*rows.shape, width)
    indices[rows] = codes.indices
    values = codes.values.new_zeros(*rows.shape, width)
    return Codes(indices, values.masked_scatter(rows[..., None], codes.values))


class Attached:
    """The dictionaries at their sites; what ``attach`` gives.

    Attributes: ``error``, whether what the dictionaries miss is added back; ``keep`` [contexts,
    positions], which positions may be changed (None: as in training; positions after its end
    always may). Both can be set between forward passes.
    """

    def __init__(self, splices: dict[Site, _Splice], error: bool, keep: Tensor | None):
        self._splices = splices
        self.error = error
        self.keep = keep

    @property
    def sites(self) -> list[Site]:
        """The sites with a dictionary, in the order of a forward pass."""
        return list(self._splices)

    def edit(self, site: Site | str, *edits: Edit | Function) -> None:
        """Add edits at a site; they act in the order in which they were added.

        An edit is ``Ablate``, ``Clamp``, ``Scale``, ``Steer``, or a function of all latents
        [contexts, positions, d_sae] that returns new ones, or None if it only reads them or changes
        them in place.

        Raises UsageError if no dictionary is attached there, it has no such latent, or positions
        are negative.
        """
        splice = self._splice(site)
        for edit in edits:
            splice.check(edit)
        splice.edits += edits

    def clear(self, site: Site | str | None = None) -> None:
        """Remove the edits at a site, or at all sites."""
        for splice in self._splices.values() if site is None else [self._splice(site)]:
            splice.edits.clear()

    def codes(self, site: Site | str) -> Codes:
        """The active latents of the last forward pass, edits included: indices and values
        [contexts, positions, slots]. Raises UsageError if there was none."""
        codes = self._splice(site).codes
        if codes is None:
            raise UsageError(f"no forward pass has reached {site} yet")
        return codes

    def latents(self, site: Site | str) -> Float[Tensor, "contexts positions d_sae"]:
        """All latents of the last forward pass, dense. Raises as ``codes`` does."""
        codes = self.codes(site)
        d_sae = self._splice(site).dictionary.d_sae
        dense = codes.values.new_zeros(*codes.values.shape[:-1], d_sae)
        return dense.scatter_add(-1, codes.indices, codes.values)

    def _splice(self, site: Site | str) -> _Splice:
        known = {str(place): splice for place, splice in self._splices.items()}
        if str(site) not in known:
            raise UsageError(f"no dictionary is attached at {site}; {nearest(str(site), known)}")
        return known[str(site)]


@contextmanager
def attach(
    model: Any,
    dictionaries: Dictionary | Sequence[Dictionary],
    *,
    error: bool = True,
    keep: Bool[Tensor, "contexts positions"] | None = None,
) -> Iterator[Attached]:
    """Attach dictionaries to a model for the duration of a ``with`` block.

    ``model`` is a TransformerBridge (its weights as loaded, neither folded nor centred), a causal
    language model of transformers, or a LanguageModel. When the block ends, also by an error, the
    model is as before. Generation works with all of them, with or without a cache. (The cache of
    TransformerLens 3.9 and 4.3 does not work with transformers 5.24 in most architectures, whether
    or not anything is attached: generate with ``use_past_kv_cache=False``.)

    The model itself is changed within the block, so passes of other threads go through the
    dictionaries too, edits included; give each thread a model of its own, or let them take turns.

    ``error`` adds back what the dictionaries miss. Without it the model continues with the
    reconstruction, and its cross-entropy is what ``evaluate`` reports if ``keep`` is the mask of
    the text's kept positions. With ``keep`` None, each dictionary skips as many positions at the
    beginning of a context as its training did (one if that is not known), and treats later special
    tokens as text.

    Raises UsageError for another kind of model, for two dictionaries at one site (nest two blocks
    instead), or for one that does not fit the model; LlmWsaeError if an architecture does not allow
    a replacement between attention and MLP.
    """
    target = target_of(model)
    chosen = [dictionaries] if isinstance(dictionaries, Dictionary) else list(dictionaries)
    splices: dict[Site, _Splice] = {}
    for dictionary in sorted(chosen, key=lambda one: one.site):
        site = dictionary.site
        target.check_site(site)
        if site in splices:
            raise UsageError(
                f"two dictionaries belong to {site}; attach one of them, or nest two blocks"
            )
        if dictionary.d_in != target.d_model:
            raise UsageError(
                f"the dictionary for {site} has {dictionary.d_in} dimensions, but {target.name} "
                f"has {target.d_model}; attach it to the model it was trained on"
            )
        splices[site] = _Splice(dictionary)
    attached = Attached(splices, error, keep)
    naming: AbstractContextManager[Mapping[Site, Any]] = nullcontext({})
    if isinstance(target, Bridge):
        naming = target.naming(attached.sites)
    with watching(target) as calls, naming as points:

        def visit(splice: _Splice, hidden: Tensor) -> Tensor | None:
            return splice.visit(hidden, calls[0], attached.keep, attached.error)

        for site, point in points.items():
            splices[site].point = point
        with target.visiting({site: partial(visit, splice) for site, splice in splices.items()}):
            yield attached
