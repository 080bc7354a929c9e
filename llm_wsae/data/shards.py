"""The shards of an activation store: written while the next rows are computed, read in any runs.

A shard is a fixed number of contexts and a function of its index alone. Its files are written,
synced and hashed first, its record last. So a process killed at any instant leaves complete shards
and perhaps some files that nothing refers to, which the next run overwrites or removes.

The rows of a shard are one block in its file, so a run of them is one read at an offset into the
caller's memory. (The pages of a mapped file would count as the process's memory, and a damaged one
would end the process with a signal.) They are compared with their checksums when a reader first
reads them, so that a training never waits for a store to be checked and reads nothing twice.
"""

import bisect
import os
import shutil
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.artifact.artifact import FileRecord
from llm_wsae.artifact.files import save_tensors
from llm_wsae.data.manifest import (
    RECORDS,
    REPAIR,
    ROWS_PER_CHECK,
    STATISTICS,
    Manifest,
    ShardRecord,
    bytes_of,
    complete_shards,
    read_statistics,
    row_checks,
    save_record,
    shard_paths,
    tokens_path,
)
from llm_wsae.data.packing import Contexts, save_contexts
from llm_wsae.errors import LlmWsaeError
from llm_wsae.statistics.moments import SAMPLE_ROWS, Statistics

NO_ROWS = "no token of these documents gives a row; lower --drop-positions"
_SAMPLED, _OF_TOKENS = 1024, 32_768
_BATCHES_AHEAD = 2


class StoreWriter:
    """Adds batches of contexts and their rows to a store; use it as a context manager."""

    def __init__(self, folder: Path, manifest: Manifest):
        """Write shards of the store that the manifest describes."""
        self._folder = folder
        self._manifest = manifest
        # One core for the writer (a setting of its thread): if its operations were spread over all
        # cores, they would wait for the forward pass, and the forward pass for them.
        self._pool = ThreadPoolExecutor(1, "store-writer", lambda: torch.set_num_threads(1))
        self._running: deque[Future] = deque()
        self._broken = False
        # One buffer per site for the rows of a shard, reused for the next: fresh memory of this
        # size costs more than copying into it.
        tokens = manifest.contexts_per_shard * manifest.context_size
        dtype = getattr(torch, manifest.dtype)
        self._rows = {
            site: torch.empty((tokens, manifest.d_in), dtype=dtype) for site in manifest.sites
        }
        # as many rows for all of its tokens, so that a few large shards are sampled as well as many
        # small ones, which together hold a larger sample
        self._sampled = min(SAMPLE_ROWS, _SAMPLED * max(1, tokens // _OF_TOKENS))
        self._begin_shard()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def add(
        self, shard: int, contexts: Contexts, rows: Mapping[str, Float[Tensor, "rows d_in"]]
    ) -> None:
        """Add the next batch of a shard: its contexts and, by site, the rows of kept positions.

        A shard is complete with its last batch; the next shard must not begin before. The work is
        done in the background, at most a few batches behind; its errors are raised by a later call.
        Raises LlmWsaeError if a row is not finite or the disk is full; nothing of that shard is
        written then.
        """
        self.wait(_BATCHES_AHEAD - 1)
        self._running.append(self._pool.submit(self._add, shard, contexts, rows))

    def wait(self, ahead: int = 0) -> None:
        """Wait until at most ``ahead`` of the batches that were added are still unwritten."""
        while len(self._running) > ahead:
            self._running.popleft().result()

    def _begin_shard(self) -> None:
        manifest = self._manifest
        self._contexts: list[Contexts] = []
        self._num_rows = 0
        self._statistics = {
            site: Statistics(manifest.d_in, manifest.context_size, self._sampled)
            for site in manifest.sites
        }

    def _add(self, index: int, contexts: Contexts, rows: Mapping[str, Tensor]) -> None:
        if self._broken:  # batches that waited must not complete a shard without the failed one
            return
        self._broken = True
        self._contexts.append(contexts)
        positions = torch.from_numpy(contexts.keep).nonzero()[:, 1]
        added = slice(self._num_rows, self._num_rows + len(positions))
        for site, statistics in self._statistics.items():
            new = self._rows[site][added].copy_(rows[site])
            try:
                statistics.update(new, positions)
            except LlmWsaeError as error:
                raise LlmWsaeError(
                    f"{site}, shard {index:05d}: {error}; the shards before it are complete; the "
                    "model may do better in float32 (--model-dtype float32)"
                ) from error
        self._num_rows = added.stop
        if sum(len(c.ids) for c in self._contexts) == self._manifest.shard_contexts(index):
            self._write_shard(index)
            self._begin_shard()
        self._broken = False

    def _write_shard(self, index: int) -> None:
        files, checks = [tokens_path(index)], {}
        save_contexts(self._folder / files[0], self._contexts)
        for site, statistics in self._statistics.items():
            path, statistics_path = shard_paths(index, site)
            rows = self._rows[site][: self._num_rows]
            save_tensors(self._folder / path, {"activations": rows})
            checks[path] = row_checks(rows)
            save_tensors(self._folder / statistics_path, statistics.to_tensors())
            files += [path, statistics_path]
        record = ShardRecord(
            contexts=sum(len(c.ids) for c in self._contexts),
            rows=self._num_rows,
            first=self._contexts[0].first,
            next=self._contexts[-1].next,
            files={path: FileRecord.of(self._folder / path) for path in files},
            row_checks=checks,
        )
        save_record(self._folder, index, record)


def finish_store(folder: Path, manifest: Manifest) -> None:
    """Finish a store that has all its shards: write the statistics of all rows and the manifest.

    Raises LlmWsaeError if there is no row.
    """
    shards = complete_shards(folder, manifest)
    assert list(shards) == list(range(manifest.num_shards))
    if not any(shard.rows for shard in shards.values()):
        raise LlmWsaeError(NO_ROWS)
    manifest.shards = list(shards.values())
    for site in manifest.sites:
        merged = Statistics(manifest.d_in, manifest.context_size)
        for index, shard in shards.items():
            path = shard_paths(index, site)[1]
            merged.merge(read_statistics(folder / path, shard.files[path]))
        path = f"{site}/{STATISTICS}"
        save_tensors(folder / path, merged.to_tensors())
        manifest.statistics[path] = FileRecord.of(folder / path)
    manifest.complete = True
    manifest.save(folder)
    shutil.rmtree(folder / RECORDS, ignore_errors=True)


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
