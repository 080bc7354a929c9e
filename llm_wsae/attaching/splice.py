"""One dictionary at its site: from the stream to latents, through the edits, and back."""

import copy
import operator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_wsae.attaching.edits import Edit, Function
from llm_wsae.attaching.targets import Call
from llm_wsae.data.config import PackConfig
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.sparse.codes import Codes


class Splice:
    """A dictionary with its edits, at a site of a running model."""

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
        """Raises UsageError for an edit that the dictionary does not allow (``Attached.edit``)."""
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
        hidden: Float[Tensor, "contexts positions d_in"],
        call: Call,
        keep: Bool[Tensor, "kept_contexts kept_positions"] | None,
        error: bool,
    ) -> Float[Tensor, "contexts positions d_in"] | None:
        """The stream to continue with; None leaves it unchanged."""
        if self.dictionary.W_enc.device != hidden.device:  # blocks may be on several devices
            self.dictionary = copy.deepcopy(self.dictionary).to(hidden.device)
        rows = self._rows(hidden, call, keep)
        x = hidden[rows]
        codes = self.dictionary.encode_sparse(x)
        edits = [*self.edits]
        if self.point is not None and self.point.has_hooks():
            edits.append(self.point)
        unchanged = error and not edits
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
        if unchanged:
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
        """The codes after an edit of some latents, and the change of the rows that it makes."""
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
        """The codes after a function of all latents, and the change of the rows that it makes."""
        before = codes.values.new_zeros(len(codes.values), self.dictionary.d_sae)
        before = before.scatter_add(1, codes.indices, codes.values)
        shown = before.new_zeros(*rows.shape, self.dictionary.d_sae)
        shown = shown.masked_scatter(rows[..., None], before)
        found = function(shown)
        if found is None:
            found = shown
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
