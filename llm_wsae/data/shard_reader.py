"""Reading runs of rows from a store's shards directly into the caller's memory.

The rows of a shard are one block in its file, so a run of them is one read at an offset. Mapping
the file would work too, but its pages would count as the process's memory, and a damaged file would
end the process with a signal.

Rows are compared with their checksums when a reader first reads them, a few at a time, so that a
training never waits for a store to be checked and reads nothing twice.
"""

import bisect
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.artifact.digests import crc32s
from llm_wsae.data.manifest import REPAIR, ROWS_PER_CHECK, ShardRecord
from llm_wsae.errors import LlmWsaeError


class RowShard(NamedTuple):
    """A shard's file of rows of one site."""

    folder: Path
    """Its store."""
    name: str
    """Path within that."""
    record: ShardRecord


class RowReader:
    """The rows of one site, as one sequence over the shards of a store, or of several."""

    def __init__(self, shards: Sequence[RowShard], d_in: int, dtype: torch.dtype):
        self._shards, self._d_in, self.dtype = shards, d_in, dtype
        self._proved: dict[int, np.ndarray] = {}  # by shard: which of its rows' checksums match
        self._checks: dict[int, np.ndarray] = {}  # by shard: those checksums
        self._ends = list(accumulate(shard.record.rows for shard in shards))
        self.num_rows = self._ends[-1] if self._ends else 0
        self.row_bytes = self._d_in * self.dtype.itemsize

    def read(self, start: int, out: Tensor) -> None:
        """Fill ``out [rows, d_in]``, contiguous and of the store's dtype, with rows from ``start``.

        Raises LlmWsaeError, naming the file, if it cannot be read or is not what was written.
        """
        assert out.is_contiguous() and out.dtype == self.dtype and out.shape[1] == self._d_in
        done = 0
        for shard, first, rows in self._pieces(start, len(out)):
            piece = out[done : done + rows]
            self._read_piece(shard, first, piece)
            self._prove(shard, first, piece)
            done += rows

    def rows(self, start: int, stop: int) -> Float[Tensor, "rows d_in"]:
        """Rows ``start`` to ``stop``, in the store's dtype. Raises as ``read`` does."""
        out = torch.empty(stop - start, self._d_in, dtype=self.dtype)
        self.read(start, out)
        return out

    def _pieces(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first row in it, rows) for each shard that a run of rows touches."""
        assert start >= 0 and start + count <= self.num_rows
        shard = bisect.bisect_right(self._ends, start)
        while count:
            first = start - (self._ends[shard - 1] if shard else 0)
            rows = min(count, self._ends[shard] - start)
            if rows:
                yield shard, first, rows
            start, count, shard = start + rows, count - rows, shard + 1

    def _prove(self, shard: int, first: int, piece: Tensor) -> None:
        """Compare rows of a shard, which have just been read, with their checksums, unless they
        have been compared before."""
        if shard not in self._proved:
            _, name, record = self._shards[shard]
            self._proved[shard] = np.zeros(-(-record.rows // ROWS_PER_CHECK), dtype=bool)
            self._checks[shard] = record.crc32s(name)
        proved, stop = self._proved[shard], first + len(piece)
        for number in range(first // ROWS_PER_CHECK, -(-stop // ROWS_PER_CHECK)):
            if proved[number]:
                continue
            begin = number * ROWS_PER_CHECK
            end = min(begin + ROWS_PER_CHECK, self._shards[shard].record.rows)
            rows = piece[max(begin - first, 0) : end - first]
            if len(rows) < end - begin:  # the caller needs only a part of them
                rows = torch.empty(end - begin, self._d_in, dtype=self.dtype)
                self._read_piece(shard, begin, rows)
            if crc32s(bytes_of(rows), rows.nbytes) != [self._checks[shard][number]]:
                raise LlmWsaeError(
                    f"{self._path(shard)} is damaged: rows {begin} to {end - 1} are not those that "
                    f"were written; {REPAIR}"
                )
            proved[number] = True

    def _path(self, shard: int) -> Path:
        return self._shards[shard].folder / self._shards[shard].name

    def _read_piece(self, shard: int, first: int, piece: Tensor) -> None:
        _, name, record = self._shards[shard]
        path, buffer = self._path(shard), bytes_of(piece)
        header = record.files[name].bytes - record.rows * self.row_bytes
        position = header + first * self.row_bytes
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                while buffer:
                    read = os.preadv(handle, [buffer], position)
                    if read == 0:
                        raise LlmWsaeError(f"{path} is truncated; {REPAIR}")
                    buffer, position = buffer[read:], position + read
            finally:
                os.close(handle)
        except OSError as error:
            raise LlmWsaeError(f"cannot read {path}: {error.strerror}") from error


def bytes_of(rows: Tensor) -> memoryview:
    """The memory of contiguous rows."""
    return rows.flatten().view(torch.uint8).numpy().data
