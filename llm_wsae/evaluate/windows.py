"""The meaning of the text around a row, as a unit vector: each window is embedded once.

Latents and dictionaries share windows, so what is asked for again, by a later dictionary too, is
looked up. Vectors are kept in half precision, which moves a cosine by less than 0.001.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.evaluate.heldout import OUTSIDE, HeldoutText

_AT_ONCE = 8192  # texts in memory


@runtime_checkable
class Encoder(Protocol):
    """What turns texts into unit vectors, as ``model.sentence_encoder`` does."""

    width: int

    def embed(self, texts: Sequence[str]) -> Tensor:
        """One unit vector per text [texts, width]."""
        ...


class WindowEmbeddings:
    """Embeddings of the windows around rows of a held-out text."""

    def __init__(
        self, text: HeldoutText, tokenizer: Any, encoder: Encoder, before: int, after: int
    ):
        """A window has ``before`` tokens, its centre and ``after`` tokens, less where its document
        or context begins or ends."""
        self._text = text
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._before, self._after = before, after
        self._place = torch.full((text.num_rows,), -1)
        self._vectors = torch.empty(0, encoder.width, dtype=torch.float16)

    def texts(self, rows: Int[Tensor, " rows"]) -> list[str]:
        """The text of each row's window."""
        cells = self._text.windows(rows, self._before, self._after)
        ids = self._text.ids.flatten()[cells].where(cells != OUTSIDE, OUTSIDE)
        inside = [[i for i in window if i != OUTSIDE] for window in ids.tolist()]
        return self._tokenizer.batch_decode(inside, skip_special_tokens=True)

    def prepare(self, rows: Int[Tensor, "*rows"]) -> None:
        """Embed the windows of these rows that are not known yet."""
        wanted = rows.unique()
        fresh = wanted[self._place[wanted] < 0]
        parts = [self._vectors]
        for part in fresh.split(_AT_ONCE):
            parts.append(self._encoder.embed(self.texts(part)).to(self._vectors))
        self._place[fresh] = torch.arange(len(fresh)) + len(self._vectors)
        self._vectors = torch.cat(parts)

    def of(self, rows: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows width"]:
        """The vectors of prepared rows, float32."""
        place = self._place[rows]
        assert bool((place >= 0).all()), "a window was not prepared"
        return self._vectors[place].float()
