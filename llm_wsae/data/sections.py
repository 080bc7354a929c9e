"""Text drawn over documents: documents in a random order, each giving one section at a time.

Documents can be long. The first contexts of a text in its own order would come from a few of them,
and what is trained or measured on these would hold for these alone. So documents are read a window
at a time (``WINDOW_DOCUMENTS``, fewer if they are long), shuffled with a fixed seed, and give
their text in rounds: each document of a window gives a section before any gives its second one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from llm_wsae.data.text_sources import RawDocument

WINDOW_DOCUMENTS = 512
_WINDOW_CHARACTERS = 1 << 26
_BREAKS = ("\n\n", "\n", ". ")  # where a section may end, the best first

T = TypeVar("T")
SectionSize = Callable[[Sequence[str]], int]
"""How many characters a section of some documents should have, from their texts."""


@dataclass(frozen=True)
class Section:
    """A piece of a document."""

    index: int
    """Its place among all sections of its part of the corpus."""
    document: int
    """Number of its document, in the order in which documents give their first section."""
    name: str
    """Name of its document."""
    text: str
    labels: dict[str, Any]
    """Labels of its document."""

    def header(self) -> dict[str, Any]:
        """What a store keeps of the document."""
        return {"name": self.name, "labels": self.labels}


def in_rounds(
    sources: Sequence[Iterator[RawDocument]], size: SectionSize | None
) -> Iterator[Section]:
    """The documents of all sources, in sections; without ``size``, each document is one section.

    Sources take turns so that, until one ends, each gives about as much text as the others.
    """
    readers = [_rounds(source, size) for source in sources]
    documents: dict[tuple[int, int], int] = {}
    for index, (number, found) in enumerate(in_turn(readers, lambda one: len(one[2]))):
        place, document, text = found
        own = documents.setdefault((number, place), len(documents))
        yield Section(index, own, document.name, text, document.labels)


def in_turn(readers: Sequence[Iterator[T]], length: Callable[[T], int]) -> Iterator[tuple[int, T]]:
    """What the readers give, with the number of the reader: the next one comes from the reader that
    has given the least so far."""
    given = dict.fromkeys(range(len(readers)), 0)
    while given:
        number = min(given, key=given.__getitem__)
        found = next(readers[number], None)
        if found is None:
            del given[number]
        else:
            given[number] += max(1, length(found))
            yield number, found


def _rounds(
    documents: Iterator[RawDocument], size: SectionSize | None
) -> Iterator[tuple[int, RawDocument, str]]:
    """Place of the document in its source, the document, and the section."""
    first = 0
    for number, window in enumerate(_windows(documents)):
        characters = size([document.text for document in window]) if size else None
        order = np.random.default_rng(number).permutation(len(window)).tolist()
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


def _windows(documents: Iterator[RawDocument]) -> Iterator[list[RawDocument]]:
    window: list[RawDocument] = []
    characters = 0
    for document in documents:
        window.append(document)
        characters += len(document.text)
        if len(window) == WINDOW_DOCUMENTS or characters >= _WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def _end(text: str, begin: int, characters: int | None) -> int:
    """Where the section that begins there ends: after a paragraph, a line or a sentence, if one
    ends in its last third, else after a word."""
    if characters is None or len(text) - begin <= characters:
        return len(text)
    end = begin + characters
    for mark in _BREAKS:
        if (at := text.rfind(mark, begin + 2 * characters // 3, end)) >= 0:
            return at + len(mark)
    at = text.rfind(" ", begin + 1, end + 1)
    return at if at > begin else end
