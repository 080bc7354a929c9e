"""What a place that text comes from gives: its documents, the same ones at every reading."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class RawDocument:
    """A document as its source gives it."""

    name: str
    """Unique in its source and the same at every reading; decides whether it is held out."""
    text: str
    labels: dict[str, Any]
    """Short JSON values that the source knows about it."""


@runtime_checkable
class Source(Protocol):
    """One place that text comes from."""

    name: str
    """How the source is named in a manifest; holds no machine's paths."""
    num_bytes: int | None
    """Size of its text, None if unknown."""

    def fingerprint(self) -> str:
        """Changes when the text changes."""

    def documents(self, start: int) -> Iterator[RawDocument]:
        """Its documents from number ``start`` on, in an order that never changes."""
