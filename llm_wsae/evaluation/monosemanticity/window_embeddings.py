"""The meaning of the text around a row, as a unit vector; each window is embedded once.

Neighbouring rows share a window, centred on the middle one of them. With 5 tokens after the centre,
five rows share one, so a text has a fifth as many windows as rows, and after a few dictionaries all
of them are known. Every row lies in its window, at most half of the shorter side from the centre.
Vectors are kept in half precision, which changes a cosine by less than 0.001.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.evaluation.heldout import OUTSIDE, HeldoutText

_AT_ONCE = 8192  # texts in memory


@runtime_checkable
class Encoder(Protocol):
    """Turns texts into unit vectors, as ``model.sentence_encoder`` does."""

    width: int

    def embed(self, texts: Sequence[str]) -> Tensor:
        """One unit vector per text [texts, width]."""
        ...


class WindowEmbeddings:
    """Embeddings of the windows around rows of a held-out text."""

    def __init__(
        self, text: HeldoutText, tokenizer: Any, encoder: Encoder, before: int, after: int
    ):
        """A window has ``before`` tokens, its centre and ``after`` tokens; fewer where its document
        or context begins or ends."""
        self._text = text
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._before, self._after = before, after
        self._centre = _centres(text, 2 * (min(before, after) // 2) + 1)
        self._place = torch.full((text.num_rows,), -1)
        self._vectors = torch.empty(0, encoder.width, dtype=torch.float16)

    def cells(self, rows: Int[Tensor, " rows"]) -> Int[Tensor, "rows width"]:
        """The positions of each row's window, -1 outside its context or its document."""
        return self._text.windows(self._centre[rows], self._before, self._after)

    def texts(self, rows: Int[Tensor, " rows"]) -> list[str]:
        """The text of each row's window."""
        cells = self.cells(rows)
        ids = self._text.ids.flatten()[cells].where(cells != OUTSIDE, OUTSIDE)
        inside = [[i for i in window if i != OUTSIDE] for window in ids.tolist()]
        return self._tokenizer.batch_decode(inside, skip_special_tokens=True)

    def prepare(self, rows: Int[Tensor, "*rows"]) -> None:
        """Embed the windows of these rows that have not been embedded yet."""
        wanted = self._centre[rows].unique()
        fresh = wanted[self._place[wanted] < 0]
        parts = [self._vectors]
        for part in fresh.split(_AT_ONCE):
            parts.append(self._encoder.embed(self.texts(part)).to(self._vectors))
        self._place[fresh] = torch.arange(len(fresh)) + len(self._vectors)
        self._vectors = torch.cat(parts)

    def of(self, rows: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows width"]:
        """The vectors of prepared rows, float32."""
        place = self._place[self._centre[rows]]
        assert bool((place >= 0).all()), "a window was not prepared"
        return self._vectors[place].float()


def _centres(text: HeldoutText, step: int) -> Int[Tensor, " rows"]:
    """The row at the centre of each row's window: the middle of its ``step`` positions, or the row
    itself if there is no row of the same document."""
    length = text.ids.shape[1]
    position = text.cell % length
    middle = position.div(step, rounding_mode="floor") * step + step // 2
    cell = text.cell - position + middle.clamp(max=length - 1)
    same = (text.row_at[cell] != OUTSIDE) & (text.document.flatten()[cell] == text.document_of)
    return text.row_at[cell].where(same, torch.arange(text.num_rows))
