"""Tokens as text: one by one, or a run of them cut into pieces."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

_LOST = "�"  # what decoding returns for part of a character
_SPACE = "▁"  # SentencePiece's, which decoding drops in front of a lone token


@dataclass(frozen=True)
class Marked:
    """A run of text split at one of its tokens."""

    before: str
    token: str
    after: str


class Vocabulary:
    """Token ids as text, or as numbers without a tokenizer."""

    def __init__(self, tokenizer: Any | None):
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        """A single token, including its leading space."""
        name = self._tokenizer and self._tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return f"<{token}>"
        if name.startswith(_SPACE):
            return str(name.replace(_SPACE, " "))
        text = self._tokenizer.decode([token])  # type: ignore[union-attr]
        return str(name if _LOST in text else text)

    def marked(self, ids: Sequence[int], at: int) -> Marked:
        """The text of some ids around one of them."""
        return Marked(*self.pieces(ids, [at, at + 1]))

    def pieces(self, ids: Sequence[int], cuts: Sequence[int]) -> list[str]:
        """The text of some ids, cut in front of the tokens at the places ``cuts``."""
        pieces, before = [], ""
        for first, stop in pairwise([0, *cuts, len(ids)]):
            # In context a token may decode differently than alone, so growing runs are decoded.
            grown = "" if self._tokenizer is None else self._tokenizer.decode(list(ids[:stop]))
            grown = grown.rstrip(_LOST)
            if grown.startswith(before) and grown != before:
                pieces.append(grown[len(before) :])
            else:  # no tokenizer, or part of a character
                pieces.append("".join(map(self.text, ids[first:stop])))
            before = grown
        return pieces
