"""Text from anywhere: one numbered sequence of documents, part of which is held out.

Every reading gives the same sequence, so that a number identifies a document and a stopped run can
resume. A hash of a document's *name* decides whether it is held out. So a document that is held out
of ``a+b`` is held out of ``a`` as well, and a corpus that grows moves no document from one side to
the other.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from llm_wsae.data.config import HELDOUT
from llm_wsae.data.hub_dataset import HUB_NAME, HubDataset
from llm_wsae.data.sections import Section, SectionSize, in_rounds, in_turn
from llm_wsae.data.text_sources import (
    SUFFIXES,
    TEXT_PACKAGES,
    RawDocument,
    TextFiles,
    TextPackage,
    TextSource,
)
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.outside import integer, local_path, number

TEXT_OF_PART = {"train": "text for training", "heldout": "held-out text", "all": "text"}
PARTS = tuple(TEXT_OF_PART)
_LONGEST_LABEL = 100


@dataclass(frozen=True)
class Document:
    """A text with its number in the corpus."""

    index: int
    """Number of the document in the whole corpus, held-out documents included."""
    name: str
    text: str
    labels: dict[str, Any]


class Corpus:
    """A sequence of documents, restricted to its training part, its held-out part, or neither."""

    def __init__(
        self,
        source: TextSource,
        part: str = "all",
        heldout_fraction: float = HELDOUT,
        text_column: str | None = None,
    ):
        """Restrict a source to a part; ``open`` finds a source by name.

        Raises UsageError for an unknown part or an impossible fraction.
        """
        if part not in PARTS:
            raise UsageError(f"a corpus has no part {part!r}; {nearest(part, PARTS)}")
        if not 0 < heldout_fraction < 1:
            raise UsageError(
                f"the held-out fraction is {heldout_fraction}; it must lie between 0 and 1"
            )
        self.source = source
        self.name = source.name
        self.part = part
        self.heldout_fraction = heldout_fraction
        self.text_column = text_column
        share = {"train": 1 - heldout_fraction, "heldout": heldout_fraction, "all": 1.0}[part]
        size = source.num_bytes
        self.num_bytes: int | None = None if size is None else math.ceil(share * size)

    @classmethod
    def open(
        cls,
        spec: str,
        part: str = "train",
        heldout_fraction: float = HELDOUT,
        text_column: str | None = None,
    ) -> "Corpus":
        """Find a corpus by name.

        ``spec`` is a ``.txt``, ``.jsonl`` or ``.parquet`` file, a folder of such files, an
        installed text package (see ``TEXT_PACKAGES``), or a Hub dataset (``name``, ``owner/name``
        or ``owner/name:config``, at its newest revision or with ``@revision``). Several of these
        joined by ``+`` take turns so that, until one ends, each gives about as much text as the
        others. ``part`` is ``train``, ``heldout`` or ``all``. ``text_column`` names the column that
        holds the text; by default that is ``text``, or the only column of strings.

        Raises UsageError if there is no such corpus, LlmWsaeError if it cannot be read or is empty.
        """
        return cls(open_source(spec, text_column), part, heldout_fraction, text_column)

    def documents(self, start: int = 0) -> Iterator[Document]:
        """The documents of this part that hold text, from number ``start`` on.

        Raises LlmWsaeError if, read from the beginning, there is none.
        """
        found = False
        for index, raw in enumerate(self.source.documents(start), start):
            if self._holds(raw):
                found = True
                yield Document(index, raw.name, _encodable(raw.text), _short(raw.labels))
        if not found and start == 0:
            raise self._nothing()

    def sections(self, size: SectionSize | None, start: int = 0) -> Iterator[Section]:
        """The text of this part over its documents (``data.sections``), from section ``start`` on.

        Raises LlmWsaeError if, read from the beginning, there is none.
        """
        sources = self.source.sources if isinstance(self.source, _Mixture) else [self.source]
        own = [
            (
                RawDocument(raw.name, _encodable(raw.text), _short(raw.labels))
                for raw in source.documents(0)
                if self._holds(raw)
            )
            for source in sources
        ]
        found = False
        for section in in_rounds(own, size):
            found = True
            if section.index >= start:
                yield section
        if not found:
            raise self._nothing()

    def identity(self) -> dict[str, Any]:
        """What a manifest records of the corpus: JSON values that differ if the documents do."""
        return {
            "name": self.name,
            "part": self.part,
            "heldout_fraction": self.heldout_fraction,
            "text_column": self.text_column,
            "fingerprint": self.source.fingerprint(),
            "order": "sections of all documents in turn",
        }

    def _holds(self, raw: RawDocument) -> bool:
        """Whether a document has text and is of this part."""
        if not raw.text.strip():
            return False
        heldout = self.part != "all" and is_heldout(raw.name, self.heldout_fraction)
        return self.part == "all" or heldout == (self.part == "heldout")

    def _nothing(self) -> LlmWsaeError:
        """The error of a part without documents."""
        if self.part == "all" or not any(d.text.strip() for d in self.source.documents(0)):
            return LlmWsaeError(f"the corpus {self.name} holds no text")
        return LlmWsaeError(
            f"the corpus {self.name} has too few documents: none of them falls into its "
            f"{self.part} part; add documents or change the held-out fraction"
        )


def open_source(spec: str, text_column: str | None) -> TextSource:
    """The source of that name; see ``Corpus.open``."""
    path = local_path(spec, "corpus")
    if spec in TEXT_PACKAGES:
        return TextPackage(spec)
    if path.exists():
        return TextFiles(path, text_column)
    if "+" in spec:
        parts = [part.strip() for part in spec.split("+")]
        if not all(parts):
            raise UsageError(f"the corpus {spec!r} has an empty part; name a text around each +")
        if twice := [part for part in parts if parts.count(part) > 1]:
            raise UsageError(f"the corpus {spec!r} names {twice[0]} twice; name each text once")
        return _Mixture([open_source(part, text_column) for part in parts])
    nested = spec.partition("@")[0].count("/") > 1
    if path.suffix in SUFFIXES or nested or spec[:1] in (".", "/", "~"):
        raise UsageError(f"there is no file or folder {spec}")
    if not HUB_NAME.fullmatch(spec):
        raise UsageError(
            f"{spec!r} names no corpus: give a file, a folder, a Hub dataset or a text package "
            f"({', '.join(TEXT_PACKAGES)})"
        )
    return HubDataset(spec, text_column)


class _Mixture:
    """Several sources in turn: the next document comes from the one that has given the fewest
    characters so far."""

    def __init__(self, sources: list[TextSource]):
        self.sources = sources
        self.name = "+".join(source.name for source in sources)
        sizes = [source.num_bytes for source in sources]
        self.num_bytes: int | None = None if None in sizes else sum(s for s in sizes if s)

    def fingerprint(self) -> str:
        return "+".join(source.fingerprint() for source in self.sources)

    def documents(self, start: int) -> Iterator[RawDocument]:
        # Whose turn it is depends on all documents before, so skipped ones are read as well.
        readers = [source.documents(0) for source in self.sources]
        turns = in_turn(readers, lambda document: len(document.text))
        return (document for _, document in islice(turns, start, None))


def is_heldout(name: str, fraction: float) -> bool:
    """Whether the document of that name belongs to the held-out ``fraction``."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _short(labels: dict[str, Any]) -> dict[str, Any]:
    """The labels that a store keeps: short strings, finite numbers and booleans."""

    def carried(value: Any) -> bool:
        if isinstance(value, str):
            return 0 < len(value) <= _LONGEST_LABEL
        known = number(value) if isinstance(value, float) else integer(value)
        return known is not None or isinstance(value, bool)

    kept = {str(key): value for key, value in labels.items() if carried(value)}
    return {
        _encodable(key): _encodable(value) if isinstance(value, str) else value
        for key, value in kept.items()
    }


def _encodable(text: str) -> str:
    """The text with ? for half surrogate pairs, which scraped JSON holds and nothing can encode."""
    return text.encode(errors="replace").decode()
