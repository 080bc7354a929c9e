"""Reading runs of rows from a store's shards directly into the caller's memory.

The rows of a shard are one block in its file, so a run of them is one read at an offset. Mapping
the file would work too, but its pages would count as the process's memory, and a damaged file would
end the process with a signal.

Rows are compared with their checksums when a reader first reads them, a few at a time, so that a
training never waits for a store to be checked and reads nothing twice.
"""

import bisect
import os
import zlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.data.manifest import REPAIR, ROWS_PER_CHECK, ShardRecord, bytes_of
from llm_wsae.errors import LlmWsaeError


class RowFile:
    """A shard's rows of one site."""

    def __init__(self, folder: Path, name: str, record: ShardRecord):
        """``name``: path within the store in ``folder``."""
        self.num_rows = record.rows
        self._path, self._bytes = folder / name, record.files[name].bytes
        self._checks = record.crc32s(name)
        self._proved = np.zeros(len(self._checks), dtype=bool)

    def read(self, first: int, out: Tensor) -> None:
        """Fill ``out`` with rows from ``first`` and compare those with their checksums that were
        not compared before."""
        self._fill(first, out)
        for number in range(first // ROWS_PER_CHECK, -(-(first + len(out)) // ROWS_PER_CHECK)):
            if self._proved[number]:
                continue
            begin = number * ROWS_PER_CHECK
            end = min(begin + ROWS_PER_CHECK, self.num_rows)
            rows = out[max(begin - first, 0) : end - first]
            if len(rows) < end - begin:  # the caller needs only a part of them
                rows = out.new_empty(end - begin, out.shape[1])
                self._fill(begin, rows)
            if zlib.crc32(bytes_of(rows)) != self._checks[number]:
                raise LlmWsaeError(
                    f"{self._path} is damaged: rows {begin} to {end - 1} are not those that were "
                    f"written; {REPAIR}"
                )
            self._proved[number] = True

    def _fill(self, first: int, out: Tensor) -> None:
        buffer, row_bytes = bytes_of(out), out.shape[1] * out.itemsize
        position = self._bytes - (self.num_rows - first) * row_bytes  # behind the file's header
        try:
            handle = os.open(self._path, os.O_RDONLY)
            try:
                while buffer:
                    read = os.preadv(handle, [buffer], position)
                    if read == 0:
                        raise LlmWsaeError(f"{self._path} is truncated; {REPAIR}")
                    buffer, position = buffer[read:], position + read
            finally:
                os.close(handle)
        except OSError as error:
            raise LlmWsaeError(f"cannot read {self._path}: {error.strerror}") from error


class RowReader:
    """The rows of one site, as one sequence over the shards of a store, or of several."""

    def __init__(self, files: Sequence[RowFile], d_in: int, dtype: torch.dtype):
        self._files, self._d_in, self.dtype = files, d_in, dtype
        self._ends = list(accumulate(file.num_rows for file in files))
        self.num_rows = self._ends[-1] if self._ends else 0
        self.row_bytes = d_in * dtype.itemsize

    def read(self, start: int, out: Tensor) -> None:
        """Fill ``out [rows, d_in]``, contiguous and of the store's dtype, with rows from ``start``.

        Raises LlmWsaeError, naming the file, if it cannot be read or is not what was written.
        """
        assert out.is_contiguous() and out.dtype == self.dtype and out.shape[1] == self._d_in
        assert start >= 0 and start + len(out) <= self.num_rows
        shard, done = bisect.bisect_right(self._ends, start), 0
        while done < len(out):
            file, end = self._files[shard], self._ends[shard] - start
            if done < end:
                file.read(done + file.num_rows - end, out[done:end])
            done, shard = end, shard + 1

    def rows(self, start: int, stop: int) -> Float[Tensor, "rows d_in"]:
        """Rows ``start`` to ``stop``, in the store's dtype. Raises as ``read`` does."""
        out = torch.empty(stop - start, self._d_in, dtype=self.dtype)
        self.read(start, out)
        return out
