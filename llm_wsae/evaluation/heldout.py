"""The held-out text that latents are scored on: its contexts and its rows.

The token ids stay in memory (a few bytes a token), so that every row leads back to its text.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llm_wsae.data.packing import NO_DOCUMENT, Contexts
from llm_wsae.errors import LlmWsaeError

OUTSIDE = -1  # a cell of a window that lies outside the text
_REACH = 5  # times as much text is read as is used


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
        """``keep`` marks the positions that give rows; ``document`` and ``offset`` are each
        position's document and place in it; ``headers`` holds the name and labels of every document
        in the contexts, by its number."""
        self.ids = ids
        self.keep = keep
        self.document = document
        self.offset = offset
        self.headers = headers
        self.num_contexts = len(ids)
        self.owner: Int[Tensor, " contexts"] = _owner(document)
        """The document that most of each context belongs to."""
        context, position = keep.nonzero(as_tuple=True)
        self.num_rows = len(context)
        self.context: Int[Tensor, " rows"] = context
        """The context of each row."""
        self.cell: Int[Tensor, " rows"] = context * ids.shape[1] + position
        """The place of each row among all positions."""
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
        """The first ``tokens`` rows, and at least two contexts.

        Where only some documents have labels (one of ``labels``, if given), half of the rows come
        from those, or as many as there are among the first five times as many rows. Raises
        LlmWsaeError if the text is too short.
        """
        headers: dict[int, dict[str, Any]] = {}
        ids, keep, document, offset = _read(blocks, _REACH * tokens, headers)
        owner, rows = _owner(document), keep.sum(1)
        labels_of = {n: header["labels"] for n, header in headers.items()}
        named = [n for n, own in labels_of.items() if (set(own) & set(labels) if labels else own)]
        labelled = torch.isin(owner, torch.tensor(named, dtype=torch.int64))
        available = [int(rows[mine].sum()) for mine in (labelled, ~labelled)]
        filled = rows > 0
        if sum(available) < tokens or int(filled.sum()) < 2:
            raise LlmWsaeError(
                f"the held-out text has {sum(available):,} tokens in {int(filled.sum())} contexts, "
                f"but {tokens:,} in at least 2 contexts are needed; ask for fewer tokens or "
                "provide more text"
            )
        theirs = min(available[0], max(tokens // 2, tokens - available[1]))
        chosen = torch.zeros(len(ids), dtype=torch.bool)
        for mine, quota in ((labelled, theirs), (~labelled, tokens - theirs)):
            of_mine = mine.nonzero()[:, 0]
            before = rows[of_mine].cumsum(0) - rows[of_mine]
            chosen[of_mine[before < quota]] = True
        if int((chosen & filled).sum()) < 2:  # so few tokens that one context holds them
            chosen[(filled & ~chosen).nonzero()[0]] = True
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
        """The positions around each row, -1 outside its context or its document."""
        length = self.ids.shape[1]
        centre = self.cell[rows][:, None]
        cells = centre + torch.arange(-before, after + 1)
        same_context = cells.div(length, rounding_mode="floor") == centre // length
        cells = cells.clamp(0, self.ids.numel() - 1)
        document = self.document.flatten()
        inside = same_context & (document[cells] == document[centre])
        return cells.where(inside, OUTSIDE)


def _read(
    blocks: Iterable[Contexts], rows: int, headers: dict[int, dict[str, Any]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, keep, document and offset of the first contexts that hold ``rows`` rows; fills
    ``headers``."""
    parts: list[Contexts] = []
    for block in blocks:
        parts.append(block)
        headers.update(block.headers)
        rows -= int(block.keep.sum())
        if rows <= 0:
            break
    if not parts:
        raise LlmWsaeError("the held-out text does not fill a single context; provide more text")
    ids, keep, document, offset = (
        torch.from_numpy(np.concatenate(column)) for column in list(zip(*parts, strict=True))[:4]
    )
    return ids.long(), keep, document.long(), offset.long()


def _owner(document: Tensor) -> Tensor:
    """The document that most of each context belongs to."""
    return document.where(document != NO_DOCUMENT, document.amax(1, keepdim=True)).mode(1).values
