"""Dictionaries inside a running model, as a context manager: reconstruct, read latents, edit them,
steer::

    with attach(model, dictionary) as attached:
        attached.edit(dictionary.site, Steer(latent=123, strength=8.0))
        ids = model.generate(ids, max_new_tokens=40)

While the block is open, the stream x at the dictionary's site is split, x = x̂ + error with
x̂ = latents · W_dec + b_dec, the latents are edited, and the stream is recombined. With the error,
only what the edits change is added to x: without any, the model computes exactly its own numbers.

Rows that the dictionary's training excluded keep the model's stream, as in ``evaluate``, and have
no latents: massive activations, padding, and the first positions of a context, or with ``keep`` the
positions that it excludes. The ``positions`` of an edit are those of the token ids, generated ones
included: ``slice(ids.shape[1], None)`` is what is generated after ``ids``. None: all.
"""

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, SupportsIndex

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from llm_wsae.data.config import PackConfig
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.sparsity import to_dense
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.model.forward import Visit
from llm_wsae.model.language_model import LanguageModel, live_model
from llm_wsae.model.site import Site
from llm_wsae.sparse.codes import Codes

Latents = SupportsIndex | Iterable[SupportsIndex]
"""A number (also of numpy or torch), or several; duplicates count once."""
Function = Callable[[Tensor], Tensor | None]
"""Receives all latents [contexts, positions, d_sae]; what it returns replaces them."""


@dataclass(frozen=True)
class Ablate:
    """Set the activations of latents to 0."""

    latent: Latents
    positions: slice | None = None

    def of(self, values: Tensor) -> Tensor:
        return values * 0


@dataclass(frozen=True)
class Clamp:
    """Set latents to a value, whether or not they fire."""

    latent: Latents
    value: float
    positions: slice | None = None

    def of(self, values: Tensor) -> Tensor:
        return values * 0 + self.value


@dataclass(frozen=True)
class Scale:
    """Multiply the activations of latents."""

    latent: Latents
    factor: float
    positions: slice | None = None

    def of(self, values: Tensor) -> Tensor:
        return values * self.factor


@dataclass(frozen=True)
class Steer:
    """Move the stream along latents' decoder directions: adds a constant to their activations."""

    latent: Latents
    strength: float
    """In units of the latent's activation: the decoder row times this is added. A negative
    strength moves the stream the other way."""
    positions: slice | None = None

    def of(self, values: Tensor) -> Tensor:
        return values + self.strength


Edit = Ablate | Clamp | Scale | Steer


class _Splice:
    """A dictionary with its edits, at a site of a running model."""

    def __init__(self, dictionary: Dictionary):
        self.dictionary = dictionary
        self.edits: list[Edit | Function] = []
        self.codes: Codes | None = None  # of the last pass, edited [contexts, positions, slots]
        self._is_read: Tensor | None = None  # by a transcoder, until its MLP writes
        self._first = PackConfig.remembered(dictionary.info.store.get("packing")).drop_positions

    def visits(self, attached: "Attached") -> list[tuple[Site, Visit]]:
        """What sees the activations at its site; a transcoder's, what it reads and what the MLP
        then writes."""
        site = self.dictionary.site
        write = (site.writes, partial(self._write, attached=attached))
        return [(site.reads, self._read), write] if site.is_mlp else [write]

    def _read(self, hidden: Tensor) -> None:
        self._is_read = hidden

    def _write(self, hidden: Tensor, attached: "Attached") -> Tensor | None:
        """What to continue with [contexts, positions, d_in]; None leaves it unchanged."""
        if self.dictionary.W_enc.device != hidden.device:  # blocks may be on several devices
            self.dictionary = copy.deepcopy(self.dictionary).to(hidden.device)
        rows = self._rows(hidden, attached)
        x = hidden[rows] if self._is_read is None else self._is_read[rows]
        self._is_read = None
        codes = self.dictionary.encode_sparse(x)
        base = hidden[rows] if attached.error else self.dictionary.decode(codes, x)
        change = torch.zeros(x.shape, dtype=self.dictionary.W_dec.dtype, device=x.device)
        for edit in self.edits:
            codes, moved = self._apply(edit, codes, rows, attached._cached)
            change = change + moved
        self.codes = Codes(_placed(codes.indices, rows), _placed(codes.values, rows))
        if attached.error and not self.edits:
            return None
        return hidden.clone().masked_scatter(rows[..., None], (base + change).to(hidden.dtype))

    @torch.no_grad()
    def _rows(self, hidden: Tensor, attached: "Attached") -> Tensor:
        """Mask of the rows that are explained [contexts, positions]."""
        if hidden.ndim != 3:
            raise LlmWsaeError(
                f"what the model has at {self.dictionary.site.writes} is a tensor of shape "
                f"{tuple(hidden.shape)}, not one vector per token; this architecture is not "
                "supported"
            )
        contexts, length = hidden.shape[:2]
        stop, keep, padding = attached._cached + length, attached.keep, attached._padding
        mask = torch.ones(contexts, stop, dtype=torch.bool, device=hidden.device)
        if padding is not None and padding.shape == mask.shape:
            mask = padding.to(hidden.device).bool()
        if keep is None:
            rows = mask & (mask.cumsum(1) > self._first)
        elif len(keep) != contexts:
            raise UsageError(
                f"keep is for {len(keep)} contexts, but the model was given {contexts}"
            )
        else:
            known = keep[:, :stop].to(hidden.device).bool()
            rows = nn.functional.pad(known, (0, stop - known.shape[1]), value=True) & mask
        rows = rows[:, attached._cached :]
        threshold = self.dictionary.info.massive_threshold
        return rows if threshold is None else rows & ~(hidden.float().norm(dim=2) > threshold)

    def _apply(
        self, edit: Edit | Function, codes: Codes, rows: Tensor, cached: int
    ) -> tuple[Codes, Tensor]:
        """The codes after an edit, and the change of the stream's rows."""
        d_sae, device = self.dictionary.d_sae, codes.indices.device
        chosen = _latents(edit) if isinstance(edit, Edit) else range(d_sae)
        latents = torch.tensor(chosen, dtype=torch.long, device=device)
        column = latents.new_full((d_sae,), len(latents))
        column[latents] = torch.arange(len(latents), device=device)
        slot = column[codes.indices]
        # the last column is for all other latents
        before = codes.values.new_zeros(len(codes.values), len(latents) + 1)
        before = before.scatter_add(1, slot, codes.values)[:, :-1]
        if isinstance(edit, Edit):
            where = torch.zeros(cached + rows.shape[1], dtype=torch.bool, device=device)
            where[edit.positions or slice(None)] = True
            here = where[cached:].expand(rows.shape)[rows]
            after = torch.where(here[:, None], edit.of(before), before)
        else:
            dense = _placed(before, rows)
            returned = edit(dense)
            after = dense if returned is None else returned  # perhaps changed in place
            if after.shape != dense.shape:
                raise UsageError(
                    f"a function of latents {list(dense.shape)} returned {list(after.shape)}"
                )
            after = after[rows]
        values = torch.cat([codes.values.where(slot == len(latents), 0.0), after], 1)
        indices = torch.cat([codes.indices, latents.expand(len(before), -1)], 1)
        # in as few slots as hold what is not 0
        width = max(1, int((values != 0).sum(1).max())) if len(values) else 1
        slots = values.detach().abs().topk(width, dim=1).indices
        new = Codes(indices.gather(1, slots), values.gather(1, slots))
        return new, (after - before) @ self.dictionary.W_dec[latents]


def _latents(edit: Edit) -> list[int]:
    """The latents of an edit, each once."""
    latent: Any = edit.latent  # one or several: arrays are both types, so only trying tells
    try:
        return [operator.index(latent)]
    except TypeError:
        return list(dict.fromkeys(map(operator.index, latent)))


def _check(edit: Edit, dictionary: Dictionary) -> None:
    where = edit.positions or slice(None)
    # negative positions would move while generating
    if min(where.start or 0, where.stop or 0, where.step or 1) < 0 or where.step == 0:
        raise UsageError(
            f"positions are counted from the first token, so {where.start}:{where.stop} with a "
            f"step of {where.step} is impossible; give numbers from 0 on"
        )
    for latent in _latents(edit):
        if not 0 <= latent < dictionary.d_sae:
            raise UsageError(
                f"there is no latent {latent}; the dictionary for {dictionary.site} has latents 0 "
                f"to {dictionary.d_sae - 1}"
            )


def _placed(values: Tensor, rows: Tensor) -> Tensor:
    """Values of ``rows`` [rows, n] as [contexts, positions, n], 0 elsewhere."""
    placed = values.new_zeros(*rows.shape, values.shape[1])
    return placed.masked_scatter(rows[..., None], values)


@dataclass(eq=False, repr=False)
class Attached:
    """The dictionaries at their sites; what ``attach`` gives.

    Attributes: ``error``, whether what the dictionaries miss is added back; ``keep`` [contexts,
    positions], which positions may be changed (None: as in training; positions after its end
    always may). Both can be set between forward passes.
    """

    _splices: dict[Site, _Splice]
    error: bool
    keep: Tensor | None
    _cached: int = 0  # positions that earlier forward passes have read
    _padding: Tensor | None = None  # which tokens are text, those included [contexts, positions]

    @property
    def sites(self) -> list[Site]:
        """The sites with a dictionary, in the order of a forward pass."""
        return list(self._splices)

    def edit(self, site: Site | str, *edits: Edit | Function) -> None:
        """Add edits at a site; they act in the order in which they were added.

        An edit is ``Ablate``, ``Clamp``, ``Scale``, ``Steer``, or a function of all latents
        [contexts, positions, d_sae] that returns new ones, or None if it only reads them or changes
        them in place. Raises UsageError if no dictionary is attached there, it has no such latent,
        or positions are negative.
        """
        splice = self._splice(site)
        for edit in edits:
            if isinstance(edit, Edit):
                _check(edit, splice.dictionary)
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
        return to_dense(self.codes(site), self._splice(site).dictionary.d_sae)

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

    ``model`` is a LanguageModel, a causal language model of transformers, or a TransformerLens
    bridge, whose own hook at a site sees the stream as it was before the dictionary. When the block
    ends, also by an error, it is as before. Generation works, with or without a cache. Within the
    block, passes of other threads go through the dictionaries too, edits included: give each thread
    a model of its own, or let them take turns.

    ``error`` adds back what the dictionaries miss. Without it the model continues with the
    reconstruction; its cross-entropy is then what ``evaluate`` reports if ``keep`` is the mask of
    the text's kept positions. Without ``keep``, each dictionary skips as many first positions of a
    context as its training did (one if that is not known), and later special tokens are text.

    Raises UsageError for another kind of model, for two dictionaries at one site (nest two blocks
    instead), or for one that does not fit the model; LlmWsaeError if an architecture does not allow
    a replacement between attention and MLP.
    """
    target = _target(model)
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
    visits = [visit for splice in splices.values() for visit in splice.visits(attached)]
    decoder = target.hf_model.get_submodule(target.paths.blocks.rpartition(".")[0])
    look = decoder.register_forward_pre_hook(partial(_look, attached), with_kwargs=True)
    try:
        with target.visiting(visits):
            yield attached
    finally:
        look.remove()


def _target(model: Any) -> LanguageModel:
    if isinstance(model, LanguageModel):
        return model
    hf_model = live_model(model)
    # Neither copied nor frozen: this very model must be hooked.
    return LanguageModel(hf_model, None, type(hf_model).__name__)


def _look(attached: Attached, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Read off a decoder's arguments what the forward pass that begins is about."""
    from transformers import Cache

    # By type: the parameter's name changed between versions of transformers.
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    attached._cached = int(caches[0].get_seq_length()) if caches else 0
    attached._padding = _padding(kwargs.get("attention_mask"), attached._cached)


def _padding(mask: Any, cached: int) -> Tensor | None:
    """Which tokens are text [contexts, positions], from either form of mask of a decoder."""
    if isinstance(mask, dict):  # one for each kind of attention
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return None
    if mask.ndim == 2:
        return mask
    # [contexts, 1, queries, keys]: the last position attends to all text
    seen = mask[:, 0, -1, : cached + mask.shape[2]]
    return seen if seen.dtype == torch.bool else seen == 0  # else it is added to scores
