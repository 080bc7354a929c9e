"""What dictionaries are measured on: held-out text, its activations, and what it means.

A row is massive when its norm exceeds ten median norms. A few such rows would dominate every mean
and every list of top contexts, so training omits them and records the threshold
(``Statistics.massive_threshold``). Measurements omit what training omitted. For dictionaries
without a record (made by other tools) the median norm of the evaluated text takes its place.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.packing import NO_DOCUMENT, Contexts
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import MASSIVE_RATIO

OUTSIDE = -1  # a cell of a window that lies outside the text
_CACHE_BYTES = 1 << 30
_REACH = 5  # times as much text is read as is used
_AT_ONCE = 8192  # texts in memory


@runtime_checkable
class Context(Protocol):
    """What is read of a context: token ids and which positions are kept, both [positions]."""

    @property
    def ids(self) -> np.ndarray | Tensor: ...

    @property
    def keep(self) -> np.ndarray | Tensor: ...


def take_contexts(contexts: Iterable[Context], tokens: int) -> list[Context]:
    """The first contexts, at least two, that hold ``tokens`` rows. Raises LlmWsaeError if there are
    too few, UsageError if they have different lengths or none has a second row, whose prediction
    could be scored."""
    taken: list[Context] = []
    rows: list[int] = []
    for context in contexts:
        taken.append(context)
        rows.append(int(context.keep.sum()))
        if len(context.ids) != len(taken[0].ids):
            raise UsageError(
                f"the text to evaluate on has contexts of {len(taken[0].ids):,} and of "
                f"{len(context.ids):,} tokens; pack or pad them to one length"
            )
        if sum(rows) >= tokens and len(taken) >= 2:
            break
    if sum(rows) < tokens or len(taken) < 2:
        raise _too_short("the text to evaluate on", sum(rows), len(taken), tokens)
    if max(rows) < 2:
        raise UsageError(
            "no context of the text to evaluate on has two rows, so no prediction can be scored; "
            "train on rows with a larger context-size or a smaller drop-positions"
        )
    return taken


def _too_short(text: str, rows: int, contexts: int, tokens: int) -> LlmWsaeError:
    return LlmWsaeError(
        f"{text} holds {rows:,} tokens in {contexts} contexts, but {tokens:,} tokens in at least 2 "
        "contexts are needed; ask for fewer tokens or provide more text"
    )


def stacked(contexts: Sequence[Context]) -> tuple[Tensor, Tensor, Tensor]:
    """Their ids, which positions are kept, and the number of each position's document, all
    [contexts, positions]. A context that names no documents (``packing.Context`` does) is one."""
    ids = [torch.as_tensor(context.ids).long() for context in contexts]
    keep = [torch.as_tensor(context.keep).bool() for context in contexts]
    documents = [
        torch.as_tensor(getattr(context, "document", np.full(len(context.ids), number))).long()
        for number, context in enumerate(contexts)
    ]
    return torch.stack(ids), torch.stack(keep), torch.stack(documents)


class RowBatch(NamedTuple):
    """The rows of consecutive contexts."""

    contexts: slice
    rows: slice
    activations: dict[Site, Float[Tensor, "rows d_in"]]


class ActivationCache:
    """Activations of a text at any site, in the model's dtype and on its device. As many as there
    is room for stay in memory, so that another pass costs no further forward pass."""

    def __init__(
        self,
        model: LanguageModel,
        ids: Int[Tensor, "contexts positions"],
        keep: Bool[Tensor, "contexts positions"],
        batch_tokens: int,
        room: int = _CACHE_BYTES,
    ):
        """``keep`` marks the positions that give rows; ``batch_tokens`` go through the model at
        once, at least one context; ``room`` is the size of what stays in memory."""
        size = max(1, batch_tokens // ids.shape[1])
        self.batches = list(zip(ids.split(size), keep.split(size), strict=True))
        """Token ids and which positions are kept, both [contexts, positions]."""
        self._model = model
        self._bytes_left = room
        self._kept: dict[tuple[Site, int], Tensor] = {}
        self._medians: dict[Site, float] = {}

    def rows(self, sites: Sequence[Site]) -> Iterator[RowBatch]:
        """All rows at the sites, in the order of the text."""
        contexts = rows = 0
        bar = tqdm(self.batches, desc="held-out text", unit="batch", leave=False)
        for number, (_, keep) in enumerate(bar):
            first, start = contexts, rows
            contexts, rows = first + len(keep), start + int(keep.sum())
            whole = self.at(number, sites)
            found = {site: hidden[keep.to(hidden.device)] for site, hidden in whole.items()}
            yield RowBatch(slice(first, contexts), slice(start, rows), found)

    def at(self, number: int, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Activations [contexts, positions, d_in] of batch ``number``; the model runs only for the
        sites that are not kept."""
        found = {site: self._kept[site, number] for site in sites if (site, number) in self._kept}
        if missing := [site for site in sites if site not in found]:
            for site, hidden in self._model.activations(self.batches[number][0], missing).items():
                found[site] = self._keep(number, site, hidden)
        return found

    def kept(self, number: int, site: Site, make: Callable[[], Tensor]) -> Tensor:
        """What is in memory of a batch, or is made now and kept if there is room for it."""
        known = self._kept.get((site, number))
        return self._keep(number, site, make()) if known is None else known

    def _keep(self, number: int, site: Site, hidden: Tensor) -> Tensor:
        if hidden.nbytes <= self._bytes_left:
            self._bytes_left -= hidden.nbytes
            self._kept[site, number] = hidden
        return hidden

    def read(self, sites: Sequence[Site]) -> None:
        """Run the model once for all sites, as far as there is room for what it gives."""
        for number in range(len(self.batches)):
            if any((site, number) not in self._kept for site in self.at(number, sites)):
                break

    def massive_threshold(self, site: Site, dictionaries: Iterable[Dictionary]) -> float:
        """Norm above which a row at the site is massive: the smallest that one of its dictionaries
        records, so that all are measured on the same rows."""
        recorded = [one.info.massive_threshold for one in dictionaries if one.site.writes == site]
        known = [threshold for threshold in recorded if threshold is not None]
        if known:
            return min(known)
        if site not in self._medians:
            norms = [b.activations[site].float().norm(dim=1).cpu() for b in self.rows([site])]
            self._medians[site] = float(torch.cat(norms).median())
        return MASSIVE_RATIO * self._medians[site]


def on_device_of(model: LanguageModel, dictionary: Dictionary) -> Dictionary:
    """The dictionary, or a copy of it, on the model's device."""
    if dictionary.W_enc.device == model.device:
        return dictionary
    return copy.deepcopy(dictionary).to(model.device)


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
        position's document and place in it; ``headers`` are the names and labels of documents."""
        self.ids, self.keep, self.document, self.offset = ids, keep, document, offset
        self.num_contexts, present = len(ids), set(document.unique().tolist())
        self.headers = {number: own for number, own in headers.items() if number in present}
        known = document.where(document != NO_DOCUMENT, document.amax(1, keepdim=True))
        self.owner: Int[Tensor, " contexts"] = known.mode(1).values  # which most of a context is of
        self.context, position = keep.nonzero(as_tuple=True)
        self.num_rows = len(position)
        self.cell: Int[Tensor, " rows"] = self.context * ids.shape[1] + position
        self.row_at: Int[Tensor, " cells"] = torch.full((ids.numel(),), OUTSIDE)
        self.row_at[self.cell] = torch.arange(self.num_rows)
        self.token: Int[Tensor, " rows"] = ids.flatten()[self.cell]
        self.document_of: Int[Tensor, " rows"] = document.flatten()[self.cell]

    @classmethod
    def take(
        cls, blocks: Iterable[Contexts], tokens: int, labels: Sequence[str] = ()
    ) -> "HeldoutText":
        """The first ``tokens`` rows, and at least two contexts. Where only some documents have
        labels (one of ``labels``, if given), half of the rows come from those, or as many as there
        are among the first five times as many rows. Raises LlmWsaeError if the text is too short.
        """
        whole = cls._read(blocks, _REACH * tokens)
        rows = whole.keep.sum(1)
        labels_of = {n: header["labels"] for n, header in whole.headers.items()}
        named = [n for n, own in labels_of.items() if (set(own) & set(labels) if labels else own)]
        labelled = torch.isin(whole.owner, torch.tensor(named, dtype=torch.int64))
        available = [int(rows[mine].sum()) for mine in (labelled, ~labelled)]
        filled = rows > 0
        if sum(available) < tokens or int(filled.sum()) < 2:
            raise _too_short("the held-out text", sum(available), int(filled.sum()), tokens)
        theirs = min(available[0], max(tokens // 2, tokens - available[1]))
        chosen = torch.zeros(len(rows), dtype=torch.bool)
        for mine, quota in ((labelled, theirs), (~labelled, tokens - theirs)):
            of_mine = mine.nonzero()[:, 0]
            before = rows[of_mine].cumsum(0) - rows[of_mine]
            chosen[of_mine[before < quota]] = True
        if int((chosen & filled).sum()) < 2:  # so few tokens that one context holds them
            chosen[(filled & ~chosen).nonzero()[0]] = True
        ids, keep = whole.ids[chosen], whole.keep[chosen]
        return cls(ids, keep, whole.document[chosen], whole.offset[chosen], whole.headers)

    @classmethod
    def _read(cls, blocks: Iterable[Contexts], rows: int) -> "HeldoutText":
        """The first contexts that hold ``rows`` rows, or all."""
        parts: list[Contexts] = []
        for block in blocks:
            parts.append(block)
            rows -= int(block.keep.sum())
            if rows <= 0:
                break
        if not parts:
            raise LlmWsaeError(
                "the held-out text does not fill a single context; provide more text"
            )
        columns = [np.concatenate(column) for column in list(zip(*parts, strict=True))[:4]]
        ids, keep, document, offset = map(torch.from_numpy, columns)
        headers = {number: header for part in parts for number, header in part.headers.items()}
        return cls(ids.long(), keep, document.long(), offset.long(), headers)

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


@runtime_checkable
class Encoder(Protocol):
    """Turns texts into unit vectors [texts, width], as ``model.sentence_encoder`` does."""

    width: int

    def embed(self, texts: Sequence[str]) -> Tensor: ...


class WindowEmbeddings:
    """The meaning of the text around rows, as unit vectors; each window is embedded once.
    Neighbouring rows share a window, centred on the middle one of them: five rows where 5 tokens
    follow the centre. Vectors have half precision, which changes a cosine by less than 0.001."""

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
        """Embed the windows of these rows that are not known yet, many at a time."""
        wanted = self._centre[rows].unique()
        fresh = wanted[self._place[wanted] < 0]
        texts = map(self.texts, fresh.split(_AT_ONCE))
        made = [self._encoder.embed(some).to(self._vectors) for some in texts]
        self._place[fresh] = torch.arange(len(fresh)) + len(self._vectors)
        self._vectors = torch.cat([self._vectors, *made])

    def of(self, rows: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows width"]:
        """The vectors of the rows' windows, float32."""
        self.prepare(rows)
        return self._vectors[self._place[self._centre[rows]]].float()


def _centres(text: HeldoutText, step: int) -> Int[Tensor, " rows"]:
    """The row at the centre of each row's window: the middle of its ``step`` positions, or the row
    itself if there is no row of the same document."""
    length = text.ids.shape[1]
    position = text.cell % length
    middle = position.div(step, rounding_mode="floor") * step + step // 2
    cell = text.cell - position + middle.clamp(max=length - 1)
    same = (text.row_at[cell] != OUTSIDE) & (text.document.flatten()[cell] == text.document_of)
    return text.row_at[cell].where(same, torch.arange(text.num_rows))
