"""Of how many documents a text is.

Tokens of one document resemble each other, so what is measured holds for documents as sure as there
are many of them: intervals are over documents, and every report says how many there were.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

FEWEST = 20
"""Effective documents; results on fewer say little about other text."""


@dataclass(frozen=True)
class TextSize:
    """Tokens and documents of a text."""

    tokens: int
    documents: int
    effective: float
    """1/Σ share², where share is a document's part of the tokens: as many documents of one length
    would count as much."""

    @classmethod
    def of(cls, documents: Int[np.ndarray, " tokens"]) -> "TextSize":
        """From the number of each token's document."""
        counts = np.unique(documents, return_counts=True)[1].astype(np.float64)
        total = counts.sum()
        effective = total**2 / (counts**2).sum() if len(counts) else 0.0
        return cls(int(total), len(counts), float(effective))

    def text(self, of: str) -> str:
        """For example: 50,012 tokens of held-out text from 212 documents (effectively 180)."""
        return (
            f"{self.tokens:,} tokens of {of} from {self.documents:,} "
            f"document{'' if self.documents == 1 else 's'} (effectively {self.effective:.0f})"
        )

    def warnings(self) -> list[str]:
        """A sentence if these are too few documents."""
        if self.effective >= FEWEST:
            return []
        return [
            f"the text is effectively of {self.effective:.1f} documents, fewer than {FEWEST}: the "
            "results say little about other text; read more documents, or hold out more of them "
            "before training"
        ]


def owners(documents: Sequence[Int[np.ndarray, " _"]]) -> Int[np.ndarray, " contexts"]:
    """The document that most of each context's tokens are of, numbered anew from 0."""
    most = []
    for own in documents:
        numbers, counts = np.unique(own, return_counts=True)
        most.append(numbers[counts.argmax()] if len(numbers) else -1)
    return np.unique(np.array(most), return_inverse=True)[1]
