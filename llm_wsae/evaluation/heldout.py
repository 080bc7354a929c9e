"""The held-out text that latents are scored on: its contexts, its rows, and what the text around a
row means.

Token ids stay in memory (a few bytes a token), so that every row leads back to its text.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_wsae.data.packing import NO_DOCUMENT, Contexts
from llm_wsae.errors import LlmWsaeError

OUTSIDE = -1  # a cell of a window that lies outside the text
_REACH = 5  # times as much text is read as is used
_AT_ONCE = 8192  # texts in memory


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
        in the contexts, by its number.

        Of each row, ``context``, ``cell`` (its place among all positions), ``token`` and
        ``document_of``; ``row_at`` every cell (-1 where none is kept); ``first_row`` of each
        context, and behind the last; ``owner``, the document that most of a context belongs to.
        """
        self.ids, self.keep, self.document, self.offset = ids, keep, document, offset
        self.headers = headers
        self.num_contexts = len(ids)
        self.owner: Int[Tensor, " contexts"] = _owner(document)
        self.context, position = keep.nonzero(as_tuple=True)
        self.num_rows = len(position)
        self.cell: Int[Tensor, " rows"] = self.context * ids.shape[1] + position
        self.row_at: Int[Tensor, " cells"] = torch.full((ids.numel(),), OUTSIDE)
        self.row_at[self.cell] = torch.arange(self.num_rows)
        self.first_row = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
        self.token: Int[Tensor, " rows"] = ids.flatten()[self.cell]
        self.document_of: Int[Tensor, " rows"] = document.flatten()[self.cell]

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
        ids, keep, document, offset = (part[chosen] for part in (ids, keep, document, offset))
        present = set(document.unique().tolist())
        headers = {number: header for number, header in headers.items() if number in present}
        return cls(ids, keep, document, offset, headers)

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
) -> tuple[Tensor, ...]:
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
    return document.where(document != NO_DOCUMENT, document.amax(1, keepdim=True)).mode(1).values


@runtime_checkable
class Encoder(Protocol):
    """Turns texts into unit vectors, as ``model.sentence_encoder`` does."""

    width: int

    def embed(self, texts: Sequence[str]) -> Tensor:
        """One unit vector per text [texts, width]."""
        ...


class WindowEmbeddings:
    """The meaning of the text around rows, as unit vectors; each window is embedded once.

    Neighbouring rows share a window, centred on the middle one of them. With 5 tokens after the
    centre, five rows share one, so a text has a fifth as many windows as rows, and after a few
    dictionaries all of them are known. Every row lies in its window, at most half of the shorter
    side from the centre. Vectors are kept in half precision, which changes a cosine by less than
    0.001.
    """

    def __init__(
        self, text: HeldoutText, tokenizer: Any, encoder: Encoder, before: int, after: int
    ):
        """A window has ``before`` tokens, its centre and ``after`` tokens; fewer where its document
        or context begins or ends."""
        self._text, self._tokenizer, self._encoder = text, tokenizer, encoder
        self._before, self._after = before, after
        self._centre = _centres(text, 2 * (min(before, after) // 2) + 1)
        self._place = torch.full((text.num_rows,), -1)
        self._vectors = torch.empty(0, encoder.width, dtype=torch.float16)

    def cells(self, rows: Int[Tensor, " rows"]) -> Int[Tensor, "rows width"]:
        """The positions of each row's window, -1 outside its context or its document."""
        return self._text.windows(self._centre[rows], self._before, self._after)

    def texts(self, rows: Int[Tensor, " rows"]) -> list[str]:
        """The text of each row's window."""
        cells = self.cells(rows)
        ids = self._text.ids.flatten()[cells].where(cells != OUTSIDE, OUTSIDE)
        inside = [[i for i in window if i != OUTSIDE] for window in ids.tolist()]
        return self._tokenizer.batch_decode(inside, skip_special_tokens=True)

    def prepare(self, rows: Int[Tensor, "*rows"]) -> None:
        """Embed the windows of these rows that have not been embedded yet."""
        wanted = self._centre[rows].unique()
        fresh = wanted[self._place[wanted] < 0]
        parts = [self._vectors]
        for part in fresh.split(_AT_ONCE):
            parts.append(self._encoder.embed(self.texts(part)).to(self._vectors))
        self._place[fresh] = torch.arange(len(fresh)) + len(self._vectors)
        self._vectors = torch.cat(parts)

    def of(self, rows: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows width"]:
        """The vectors of prepared rows, float32."""
        place = self._place[self._centre[rows]]
        assert bool((place >= 0).all()), "a window was not prepared"
        return self._vectors[place].float()


def _centres(text: HeldoutText, step: int) -> Int[Tensor, " rows"]:
    """The row at the centre of each row's window: the middle of its ``step`` positions, or the row
    itself if there is no row of the same document."""
    length = text.ids.shape[1]
    position = text.cell % length
    middle = position.div(step, rounding_mode="floor") * step + step // 2
    cell = text.cell - position + middle.clamp(max=length - 1)
    same = (text.row_at[cell] != OUTSIDE) & (text.document.flatten()[cell] == text.document_of)
    return text.row_at[cell].where(same, torch.arange(text.num_rows))
