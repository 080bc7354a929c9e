"""Tokens as text: one by one, in a run of text, and a run cut into pieces."""

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
        if self._tokenizer is None:
            return f"<{token}>"
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return f"<{token}>"
        if name.startswith(_SPACE):
            return name.replace(_SPACE, " ")
        text = self._tokenizer.decode([token])
        return name if _LOST in text else text

    def marked(self, ids: Sequence[int], at: int) -> Marked:
        """The text of some ids around one of them."""
        if self._tokenizer is None:
            parts = (ids[:at], ids[at : at + 1], ids[at + 1 :])
            return Marked(*("".join(map(self.text, part)) for part in parts))
        # In context a token may decode differently than alone, so growing runs are decoded.
        before, within, whole = (
            self._tokenizer.decode(list(ids[:stop])) for stop in (at, at + 1, len(ids))
        )
        before = before.rstrip(_LOST)
        if within.startswith(before) and whole.startswith(within):
            return Marked(before, within[len(before) :], whole[len(within) :])
        rest = self._tokenizer.decode(list(ids[at + 1 :]))
        return Marked(before, self.text(int(ids[at])), rest)

    def pieces(self, ids: Sequence[int], cuts: Sequence[int]) -> list[str]:
        """The text of some ids, cut in front of the tokens at the places ``cuts``."""
        runs = [ids[first:stop] for first, stop in pairwise([0, *cuts, len(ids)])]
        if self._tokenizer is None:
            return ["".join(map(self.text, run)) for run in runs]
        pieces, before = [], ""
        for run, stop in zip(runs, [*cuts, len(ids)], strict=True):
            grown = self._tokenizer.decode(list(ids[:stop])).rstrip(_LOST)
            alone = not grown.startswith(before) or grown == before  # e.g. part of a character
            pieces.append("".join(map(self.text, run)) if alone else grown[len(before) :])
            before = grown
        return pieces
