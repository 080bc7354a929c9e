"""Shuffled batches out of a sequence of rows that is far larger than memory.

Training wants rows in random order; a disk wants to be read in long runs. So the store is seen as
chunks of 1024 consecutive rows. In each epoch the chunks are put in a random order, as many as fit
in ``window_bytes`` are read together, and the rows of such a window are shuffled among each other.
The windows of all epochs, one after the other, are one endless sequence of rows, and batch number b
is rows b·B to (b+1)·B − 1 of it. Everything random is drawn from (seed, epoch, window), so to go on
at a batch means to compute which window it lies in and read that one.

At most three windows are in memory: the one that is cut into batches, and while it lasts the next
one is read and shuffled.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.data.prefetch import prefetch
from llm_wsae.data.rows import RowReader
from llm_wsae.errors import UsageError
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import Statistics

CHUNK_ROWS = 1024
WINDOW_BYTES = 256 << 20
_BATCHES_AHEAD = 4


@runtime_checkable
class ActivationSource(Protocol):
    """What a trainer reads: rows of one site, in shuffled batches that a seed determines."""

    d_in: int
    """Width of the rows."""
    site: Site
    """Where in the model they come from."""
    num_rows: int | None
    """Rows in one epoch, None if unknown."""

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
        """Endless batches [batch_size, d_in] from number ``start`` on."""

    def statistics(self) -> Statistics:
        """Statistics of the rows."""

    def identity(self) -> dict[str, Any]:
        """JSON values that tell these rows from others."""


class Window(NamedTuple):
    """Rows that are shuffled together."""

    epoch: int
    number: int
    """Number of the window in its epoch."""
    chunks: np.ndarray
    """The chunks in it, in the order in which they are read."""


def shuffled_batches(
    reader: RowReader, batch_size: int, seed: int, start: int = 0, window_bytes: int = WINDOW_BYTES
) -> Iterator[Float[Tensor, "batch d_in"]]:
    """Endless shuffled batches of all rows of a reader, from batch number ``start`` on.

    Raises UsageError if the numbers make no sense or there are no rows; reading errors come with
    the batch that they would have been in.
    """
    if batch_size < 1 or start < 0:
        raise UsageError(
            f"cannot begin at batch {start} of {batch_size} rows; the batch size must be at least "
            "1 and the number not negative"
        )
    if reader.num_rows == 0:
        raise UsageError("the store holds no rows to train on; harvest more tokens")
    per_window = max(1, window_bytes // (CHUNK_ROWS * reader.row_bytes))
    epoch, skip = divmod(start * batch_size, reader.num_rows)

    def windows() -> Iterator[Tensor]:
        """Windows from the one that holds row ``skip`` of ``epoch`` on, cut there."""
        left = skip
        for window in _windows(reader.num_rows, per_window, seed, epoch):
            size = _rows_in(window.chunks, reader.num_rows)
            if left < size:
                yield _load(reader, window, size, seed)[left:]
            left = max(0, left - size)

    return prefetch(cut(prefetch(windows(), depth=1), batch_size), depth=_BATCHES_AHEAD)


def cut(blocks: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """The rows of all blocks, one after the other, in batches of exactly ``batch_size``."""
    parts: list[Tensor] = []
    lack = batch_size
    for block in blocks:
        at = 0
        while at < len(block):
            part = block[at : at + lack]
            at += len(part)
            lack -= len(part)
            # Copied, so that a batch that is kept does not keep its window.
            parts.append(part.clone())
            if lack == 0:
                yield parts[0] if len(parts) == 1 else torch.cat(parts)
                parts, lack = [], batch_size
        del block  # it may go while the next one is waited for


def shuffle(rows: Tensor, *seed: int) -> Tensor:
    """The rows in an order that the numbers determine (a copy)."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows[torch.from_numpy(order)]


def _windows(num_rows: int, per_window: int, seed: int, epoch: int) -> Iterator[Window]:
    """The windows of an epoch and of all behind it."""
    num_chunks = -(-num_rows // CHUNK_ROWS)
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(num_chunks)
        # Of equal size, rather than a last one with so few chunks that they mix badly.
        for number, chunks in enumerate(np.array_split(order, -(-num_chunks // per_window))):
            yield Window(epoch, number, chunks)
        epoch += 1


def _rows_in(chunks: np.ndarray, num_rows: int) -> int:
    return int(np.minimum(CHUNK_ROWS, num_rows - chunks * CHUNK_ROWS).sum())


def _load(reader: RowReader, window: Window, size: int, seed: int) -> Tensor:
    """The rows of a window, read in the order of the file and shuffled."""
    rows = torch.empty(size, reader.row_bytes // reader.dtype.itemsize, dtype=reader.dtype)
    at = 0
    for chunk in np.sort(window.chunks).tolist():
        first = chunk * CHUNK_ROWS
        count = min(CHUNK_ROWS, reader.num_rows - first)
        reader.read(first, rows[at : at + count])
        at += count
    return shuffle(rows, seed, window.epoch, window.number)
