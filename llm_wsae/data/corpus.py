"""Text from anywhere, a part of it held out, drawn over its documents in sections.

A hash of a document's *name* decides whether it is held out. So a document that is held out of
``a+b`` is held out of ``a`` as well, and a corpus that grows moves no document from one side to
the other.

Documents can be long, and the first contexts of a text in its own order would come from a few of
them. So documents are read a window at a time, shuffled with a fixed seed, and give their text in
rounds: each document of a window gives a section before any gives its second one. Every reading
gives the same sections, so that a stopped run can resume.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_wsae.data.config import HELDOUT
from llm_wsae.data.text_sources import Document, TextSource, open_sources
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.outside import integer

TEXT_OF_PART = {"train": "text for training", "heldout": "held-out text", "all": "text"}
_LONGEST_LABEL = 100
_WINDOW_DOCUMENTS = 512
_WINDOW_CHARACTERS = 1 << 26
_BREAKS = ("\n\n", "\n", ". ")  # where a section may end, the best first

SectionSize = Callable[[Sequence[str]], int]
"""How many characters a section of some documents should have, from their texts."""


@dataclass(frozen=True)
class Section:
    """A piece of a document."""

    index: int
    """Its place among all sections of its part of the corpus."""
    document: int
    """Number of its document, in the order of their first sections."""
    name: str
    """Of its document, as ``labels`` are."""
    text: str
    labels: dict[str, Any]


class Corpus:
    """The documents of some sources: their training part, their held-out part, or all."""

    def __init__(
        self,
        sources: Sequence[TextSource],
        part: str = "all",
        heldout_fraction: float = HELDOUT,
        text_column: str | None = None,
    ):
        """Raises UsageError for an unknown part or an impossible fraction."""
        if part not in TEXT_OF_PART:
            raise UsageError(f"a corpus has no part {part!r}; {nearest(part, TEXT_OF_PART)}")
        if not 0 < heldout_fraction < 1:
            raise UsageError(
                f"the held-out fraction is {heldout_fraction}; it must lie between 0 and 1"
            )
        self.sources, self.part = sources, part
        self.name = "+".join(source.name for source in sources)
        self.heldout_fraction, self.text_column = heldout_fraction, text_column
        share = {"train": 1 - heldout_fraction, "heldout": heldout_fraction, "all": 1.0}[part]
        sizes = [source.num_bytes for source in sources if source.num_bytes is not None]
        is_known = len(sizes) == len(sources)
        self.num_bytes: int | None = math.ceil(share * sum(sizes)) if is_known else None

    @classmethod
    def open(
        cls,
        spec: str,
        part: str = "train",
        heldout_fraction: float = HELDOUT,
        text_column: str | None = None,
    ) -> "Corpus":
        """Find a corpus by name: a ``.txt``, ``.jsonl`` or ``.parquet`` file, a folder of such
        files, an installed text package (see ``TEXT_PACKAGES``), or a Hub dataset (``name``,
        ``owner/name`` or ``owner/name:config``, at its newest revision or with ``@revision``).
        Several of these joined by ``+`` take turns so that, until one ends, each gives about as
        much text as the others. ``part`` is ``train``, ``heldout`` or ``all``. ``text_column``
        holds the text; by default that is ``text``, or the only column of strings.

        Raises UsageError if there is no such corpus, LlmWsaeError if it cannot be read or is empty.
        """
        return cls(open_sources(spec, text_column), part, heldout_fraction, text_column)

    def sections(self, size: SectionSize | None, start: int = 0) -> Iterator[Section]:
        """The text of this part over its documents, from section ``start`` on; without ``size``,
        each document is one section. Raises LlmWsaeError if there is no text at all."""
        readers = [_in_rounds(self._documents(source), size) for source in self.sources]
        given = dict.fromkeys(range(len(readers)), 0)  # characters; who gave the least is next
        documents: dict[tuple[int, int], int] = {}
        index = 0
        while given:
            turn = min(given, key=given.__getitem__)
            found = next(readers[turn], None)
            if found is None:
                del given[turn]
                continue
            place, document, text = found
            given[turn] += len(text)
            own = documents.setdefault((turn, place), len(documents))
            if index >= start:
                yield Section(index, own, document.name, text, document.labels)
            index += 1
        if index == 0:
            where = f" in its {self.part} part; add documents or change the held-out fraction"
            raise LlmWsaeError(
                f"the corpus {self.name} holds no text{where if self.part != 'all' else ''}"
            )

    def identity(self) -> dict[str, Any]:
        """What a manifest records of the corpus: JSON values that differ if the documents do."""
        return {
            "name": self.name,
            "part": self.part,
            "heldout_fraction": self.heldout_fraction,
            "text_column": self.text_column,
            "fingerprint": "+".join(source.fingerprint() for source in self.sources),
            "order": "sections of all documents in turn",
        }

    def _documents(self, source: TextSource) -> Iterator[Document]:
        """The documents of this part that hold text."""
        for one in source.documents():
            side = "heldout" if is_heldout(one.name, self.heldout_fraction) else "train"
            if self.part in ("all", side) and one.text.strip():
                yield Document(one.name, _encodable(one.text), _short(one.labels))


def is_heldout(name: str, fraction: float) -> bool:
    """Whether the document of that name belongs to the held-out ``fraction``."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _short(labels: dict[str, Any]) -> dict[str, Any]:
    """The labels that a store keeps: short strings, finite numbers and booleans."""
    short = {}
    for key, value in labels.items():
        is_finite = isinstance(value, float) and math.isfinite(value)
        if isinstance(value, str) and 0 < len(value) <= _LONGEST_LABEL:
            short[_encodable(str(key))] = _encodable(value)
        elif is_finite or isinstance(value, bool) or integer(value) is not None:
            short[_encodable(str(key))] = value
    return short


def _encodable(text: str) -> str:
    """The text with ? for half surrogate pairs, which scraped JSON holds and nothing can encode."""
    return text.encode(errors="replace").decode()


def _in_rounds(
    documents: Iterator[Document], size: SectionSize | None
) -> Iterator[tuple[int, Document, str]]:
    """Place of the document in its source, the document, and the section."""
    first = 0
    for seed, window in enumerate(_windows(documents)):
        characters = size([document.text for document in window]) if size else None
        order = np.random.default_rng(seed).permutation(len(window)).tolist()
        begins = dict.fromkeys(order, 0)
        while begins:
            for place, begin in list(begins.items()):
                text = window[place].text
                begins[place] = end = _end(text, begin, characters)
                if end == len(text):
                    del begins[place]
                if text[begin:end].strip():
                    yield first + place, window[place], text[begin:end]
        first += len(window)


def _windows(documents: Iterator[Document]) -> Iterator[list[Document]]:
    window: list[Document] = []
    characters = 0
    for document in documents:
        window.append(document)
        characters += len(document.text)
        if len(window) == _WINDOW_DOCUMENTS or characters >= _WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def _end(text: str, begin: int, characters: int | None) -> int:
    """Where a section ends: after a paragraph, a line or a sentence, if one ends in its last third,
    else after a word."""
    if characters is None or len(text) - begin <= characters:
        return len(text)
    end = begin + characters
    for mark in _BREAKS:
        if (at := text.rfind(mark, begin + 2 * characters // 3, end)) >= 0:
            return at + len(mark)
    at = text.rfind(" ", begin + 1, end + 1)
    return at if at > begin else end
