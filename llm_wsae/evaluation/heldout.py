"""The held-out text that latents are judged on: its contexts, its rows, and their activations.

The token ids are in memory (a few bytes a token), so that every row leads back to its text. The
activations are computed a batch of contexts at a time, and kept when they fit, so that many
dictionaries, one after the other, cost one forward pass.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.packing import NO_DOCUMENT, Contexts
from llm_wsae.errors import LlmWsaeError
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site

OUTSIDE = -1  # a cell of a window that stands outside of the text
_CACHE_BYTES = 1 << 30
_REACH = 5  # times as much text is read as is taken


class HeldoutText:
    """Contexts of held-out text; row r is the r-th kept position in the order of the text."""

    def __init__(
        self,
        ids: Int[Tensor, "contexts positions"],
        keep: Bool[Tensor, "contexts positions"],
        document: Int[Tensor, "contexts positions"],
        offset: Int[Tensor, "contexts positions"],
        headers: dict[int, dict[str, Any]],
    ):
        """``headers`` has name and labels of every document in the contexts, by its number."""
        self.ids = ids
        self.document = document
        self.offset = offset
        self.headers = headers
        self.num_contexts = len(ids)
        self.owner: Int[Tensor, " contexts"] = _owner(document)
        """The document that most of each context belongs to."""
        context, position = keep.nonzero(as_tuple=True)
        self.num_rows = len(context)
        self.context: Int[Tensor, " rows"] = context
        """The context that each row stands in."""
        self.cell: Int[Tensor, " rows"] = context * ids.shape[1] + position
        """Where each row stands among all positions."""
        self.row_at: Int[Tensor, " cells"] = torch.full((ids.numel(),), OUTSIDE)
        """The row at every position, -1 where none is kept."""
        self.row_at[self.cell] = torch.arange(self.num_rows)
        self.first_row: Int[Tensor, " contexts_and_one"] = torch.zeros(
            len(ids) + 1, dtype=torch.int64
        )
        self.first_row[1:] = keep.sum(1).cumsum(0)
        self.token: Int[Tensor, " rows"] = ids.flatten()[self.cell]
        """The token id of each row."""
        self.document_of: Int[Tensor, " rows"] = document.flatten()[self.cell]
        """The document of each row."""

    @classmethod
    def take(
        cls, blocks: Iterable[Contexts], tokens: int, labels: Sequence[str] = ()
    ) -> "HeldoutText":
        """``tokens`` rows out of many documents, from the first five times as many.

        First the first context of every document, then the second ones, and so on: concepts of
        documents need many documents, and long ones would fill the text. Where only some documents
        have labels (one of ``labels``, if given), half of the rows are theirs, as far as they go.
        Raises LlmWsaeError if the text is too short.
        """
        headers: dict[int, dict[str, Any]] = {}
        ids, keep, document, offset = _read(blocks, _REACH * tokens, headers)
        owner, rows = _owner(document), keep.sum(1)
        own = {n: header["labels"] for n, header in headers.items()}
        named = [n for n, found in own.items() if (set(found) & set(labels) if labels else found)]
        labelled = torch.isin(owner, torch.tensor(named, dtype=torch.int64))
        available = [int(rows[mine].sum()) for mine in (labelled, ~labelled)]
        if sum(available) < tokens or len(ids) < 2:
            raise LlmWsaeError(
                f"the held-out text has {sum(available):,} tokens in {len(ids)} contexts, but "
                f"{tokens:,} in at least 2 contexts are needed; ask for fewer tokens or give more "
                "text"
            )
        theirs = min(available[0], max(tokens // 2, tokens - available[1]))
        order = torch.argsort(_turn(owner), stable=True)
        chosen = torch.zeros(len(ids), dtype=torch.bool)
        for mine, quota in ((labelled, theirs), (~labelled, tokens - theirs)):
            of_mine = order[mine[order]]
            before = rows[of_mine].cumsum(0) - rows[of_mine]
            chosen[of_mine[before < quota]] = True
        present = set(document[chosen].unique().tolist())
        return cls(
            ids[chosen],
            keep[chosen],
            document[chosen],
            offset[chosen],
            {number: header for number, header in headers.items() if number in present},
        )

    def windows(
        self, rows: Int[Tensor, " rows"], before: int, after: int
    ) -> Int[Tensor, "rows width"]:
        """The positions around each row, -1 outside of its context or its document."""
        length = self.ids.shape[1]
        centre = self.cell[rows][:, None]
        cells = centre + torch.arange(-before, after + 1)
        same_context = cells.div(length, rounding_mode="floor") == centre // length
        cells = cells.clamp(0, self.ids.numel() - 1)
        document = self.document.flatten()
        inside = same_context & (document[cells] == document[centre])
        return cells.where(inside, OUTSIDE)


class ContextBatch(NamedTuple):
    """The activations of consecutive contexts."""

    contexts: slice
    rows: slice
    activations: dict[Site, Float[Tensor, "rows d_in"]]
    """The rows of every site, in the model's dtype and on its device."""


class Activations:
    """The activations of a held-out text, context by context."""

    def __init__(self, model: LanguageModel, text: HeldoutText, batch_tokens: int):
        self._model = model
        self._text = text
        self._contexts = max(1, batch_tokens // text.ids.shape[1])
        self._kept: dict[Site, list[Tensor]] = {}

    def batches(self, sites: Sequence[Site]) -> Iterator[ContextBatch]:
        """All rows at the sites, in the order of the text."""
        missing = [site for site in sites if site not in self._kept]
        size = self._text.num_rows * self._model.d_model * self._model.dtype.itemsize
        keep = (len(self._kept) + len(missing)) * size <= _CACHE_BYTES
        fresh: dict[Site, list[Tensor]] = {site: [] for site in missing}
        starts = range(0, self._text.num_contexts, self._contexts)
        for number, at in enumerate(tqdm(starts, desc="held-out text", unit="batch", leave=False)):
            contexts = slice(at, min(at + self._contexts, self._text.num_contexts))
            first, last = self._text.first_row[[contexts.start, contexts.stop]].tolist()
            found = {site: self._kept[site][number] for site in sites if site not in missing}
            if missing:
                found |= self._run(contexts, first, last, missing)
            if keep:
                for site in missing:
                    fresh[site].append(found[site])
            yield ContextBatch(contexts, slice(first, last), found)
        if keep:
            self._kept |= fresh

    def at_hand(self, sites: Iterable[Site]) -> bool:
        """Whether reading these sites again costs no forward pass."""
        return all(site in self._kept for site in sites)

    def _run(self, contexts: slice, first: int, last: int, sites: list[Site]) -> dict[Site, Tensor]:
        ids = self._text.ids[contexts]
        cells = self._text.cell[first:last] - contexts.start * ids.shape[1]
        hidden = self._model.activations(ids, sites)
        return {
            site: stream.flatten(0, 1)[cells.to(stream.device)] for site, stream in hidden.items()
        }


def _read(
    blocks: Iterable[Contexts], rows: int, headers: dict[int, dict[str, Any]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, keep, document, offset of the first contexts with so many rows; fills ``headers``."""
    parts: list[Contexts] = []
    for block in blocks:
        parts.append(block)
        headers.update(block.headers)
        rows -= int(block.keep.sum())
        if rows <= 0:
            break
    if not parts:
        raise LlmWsaeError("the held-out text does not fill a single context; give more text")
    ids, keep, document, offset = (
        torch.from_numpy(np.concatenate(column)) for column in list(zip(*parts, strict=True))[:4]
    )
    return ids.long(), keep, document.long(), offset.long()


def _owner(document: Tensor) -> Tensor:
    """The document that most of each context belongs to."""
    return document.where(document != NO_DOCUMENT, document.amax(1, keepdim=True)).mode(1).values


def _turn(owner: Tensor) -> Tensor:
    """How many contexts before it have the same owner, for each context."""
    grouped, order = owner.sort(stable=True)
    number = torch.arange(len(owner))
    begins = torch.ones(len(owner), dtype=torch.bool)
    begins[1:] = grouped[1:] != grouped[:-1]
    turn = torch.empty_like(owner)
    turn[order] = number - number.where(begins, 0).cummax(0).values
    return turn
