"""What a source of text must offer: the same numbered documents on every reading."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from llm_wsae.errors import UsageError


@dataclass(frozen=True)
class RawDocument:
    """A document as its source gives it."""

    name: str
    """Unique in its source and the same on every reading; it decides what is held out."""
    text: str
    labels: dict[str, Any]
    """What the source says about it: short JSON values."""


@runtime_checkable
class TextSource(Protocol):
    """One place that text comes from."""

    name: str
    """The source's name in a manifest; it holds no path of this machine."""
    num_bytes: int | None
    """Size of its text, None if unknown."""

    def fingerprint(self) -> str:
        """A string that changes when the text changes."""

    def documents(self, start: int) -> Iterator[RawDocument]:
        """The documents from number ``start`` on, in an order that never changes."""


def text_column_of(row: dict[str, Any], wanted: str | None, where: str) -> str:
    """The column of a row that holds the text: ``wanted``, else ``text``, else the only string.

    Raises UsageError, naming ``where`` and the columns, if there is none or several could be meant.
    """
    texts = [key for key, value in row.items() if isinstance(value, str)]
    columns = ", ".join(map(str, row)) or "none"
    if wanted is not None:
        if wanted not in texts:
            raise UsageError(f"{where}: no text in a column {wanted!r}; the columns are {columns}")
        return wanted
    if "text" in texts:
        return "text"
    if len(texts) != 1:
        raise UsageError(
            f"{where}: there is no column 'text' and not exactly one column of strings; the "
            f"columns are {columns}; name the one that holds the text with --text-column"
        )
    return texts[0]
