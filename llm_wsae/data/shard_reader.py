"""Reading runs of rows from a store's shards directly into the caller's memory.

The rows of a shard are one block in its file, so a run of them is one read at an offset. Mapping
the file would work too, but its pages would count as the process's memory, and a damaged file would
end the process with a signal.
"""

import bisect
import json
import os
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from llm_wsae.data.manifest import Manifest, shard_paths
from llm_wsae.errors import LlmWsaeError

_SAFETENSORS_DTYPES = {"BF16": "bfloat16", "F32": "float32"}
_LONGEST_HEADER = 1 << 20


class RowReader:
    """The rows of one site of a store, as one sequence over all its shards."""

    def __init__(self, folder: Path, manifest: Manifest, site: str):
        self._folder = folder
        self._d_in = manifest.d_in
        self.dtype: torch.dtype = getattr(torch, manifest.dtype)
        self._paths = [
            folder / shard_paths(index, [site])[site][0] for index in range(len(manifest.shards))
        ]
        self._ends = list(accumulate(shard.rows for shard in manifest.shards))
        self._offsets: dict[int, int] = {}
        self.num_rows = self._ends[-1] if self._ends else 0
        self.row_bytes = self._d_in * self.dtype.itemsize

    def read(self, start: int, out: Tensor) -> None:
        """Fill ``out [rows, d_in]``, contiguous and of the store's dtype, with rows from ``start``.

        Raises LlmWsaeError, naming the file, if it cannot be read or holds NaN or infinity.
        """
        assert out.is_contiguous() and out.dtype == self.dtype and out.shape[1] == self._d_in
        done = 0
        for shard, first, rows in self._pieces(start, len(out)):
            piece = out[done : done + rows]
            self._read_piece(shard, first, piece)
            if not bool(torch.isfinite(piece.sum(dtype=torch.float64))):
                bad = int((~torch.isfinite(piece)).any(1).sum())
                raise LlmWsaeError(
                    f"{bad} rows of {self._paths[shard]} between row {first} and "
                    f"{first + rows - 1} are NaN or infinite; `llm-wsae verify` shows whether the "
                    "store is damaged"
                )
            done += rows

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

    def _read_piece(self, shard: int, first: int, piece: Tensor) -> None:
        path = self._paths[shard]
        buffer = piece.view(torch.uint8).numpy().data.cast("B")
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                if shard not in self._offsets:
                    self._offsets[shard] = self._data_offset(shard, handle)
                position = self._offsets[shard] + first * self.row_bytes
                while buffer:
                    read = os.preadv(handle, [buffer], position)
                    if read == 0:
                        raise LlmWsaeError(
                            f"{path} is truncated; `llm-wsae verify` lists the damage"
                        )
                    buffer, position = buffer[read:], position + read
            finally:
                os.close(handle)
        except OSError as error:
            raise LlmWsaeError(f"cannot read {path}: {error.strerror}") from error

    def _data_offset(self, shard: int, handle: int) -> int:
        """Where the rows begin in a shard's file, if its header matches the manifest."""
        rows = self._ends[shard] - (self._ends[shard - 1] if shard else 0)
        length = int.from_bytes(os.pread(handle, 8, 0), "little")
        try:
            entry = json.loads(os.pread(handle, min(length, _LONGEST_HEADER), 8))["activations"]
            fits = entry["shape"] == [rows, self._d_in]
            dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
            if fits and dtype is not None and getattr(torch, dtype) == self.dtype:
                return 8 + length + entry["data_offsets"][0]
        except (ValueError, KeyError, TypeError):
            pass  # the sentence below covers all of it
        raise LlmWsaeError(
            f"{self._paths[shard]} does not hold the {rows} rows that the manifest promises; "
            "`llm-wsae verify` lists the damage"
        )
