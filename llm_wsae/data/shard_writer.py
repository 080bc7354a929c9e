"""Writing an activation store, shard by shard, while the next rows are being computed.

A shard is a fixed number of contexts and a function of its index alone. Its files are written,
synced and hashed first, its record last. So a process killed at any instant leaves complete shards
and perhaps some files that nothing refers to, which the next run overwrites or removes.
"""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.artifact.artifact import FileRecord
from llm_wsae.artifact.digests import crc32s
from llm_wsae.artifact.files import save_tensors
from llm_wsae.data.manifest import (
    ROWS_PER_CHECK,
    Manifest,
    ShardRecord,
    packed,
    save_record,
    shard_paths,
    tokens_path,
)
from llm_wsae.data.packing import Contexts, save_contexts
from llm_wsae.data.shard_reader import bytes_of
from llm_wsae.errors import LlmWsaeError
from llm_wsae.statistics.moments import SAMPLE_ROWS, Statistics

_SAMPLED, _OF_TOKENS = 1024, 32_768
_BATCHES_AHEAD = 2


def sampled_rows(shard_tokens: int) -> int:
    """Rows of a shard that its statistics sample: as many for all of its tokens, so that a few
    large shards are sampled as well as many small ones, which together hold a larger sample."""
    return min(SAMPLE_ROWS, _SAMPLED * max(1, shard_tokens // _OF_TOKENS))


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
        self._contexts: list[Contexts] = []
        # One buffer per site for the rows of a shard, reused for the next: fresh memory of this
        # size costs more than copying into it.
        shape = (manifest.contexts_per_shard * manifest.context_size, manifest.d_in)
        dtype = getattr(torch, manifest.dtype)
        self._rows = {site: torch.empty(shape, dtype=dtype) for site in manifest.sites}
        self._num_rows = 0
        self._statistics: dict[str, Statistics] = {}

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
        self._submit(lambda: self._add(shard, contexts, rows))

    def wait(self) -> None:
        """Wait until everything added is written."""
        while self._running:
            self._running.popleft().result()

    def _submit(self, work: Callable[[], None]) -> None:
        while len(self._running) >= _BATCHES_AHEAD:
            self._running.popleft().result()
        self._running.append(self._pool.submit(self._unless_broken, work))

    def _unless_broken(self, work: Callable[[], None]) -> None:
        # After a failure, the batches still waiting must not complete the shard without it.
        if not self._broken:
            self._broken = True
            work()
            self._broken = False

    def _add(self, index: int, contexts: Contexts, rows: Mapping[str, Tensor]) -> None:
        self._contexts.append(contexts)
        positions = torch.from_numpy(contexts.keep).nonzero()[:, 1]
        added = slice(self._num_rows, self._num_rows + len(positions))
        for site in self._manifest.sites:
            new = self._rows[site][added].copy_(rows[site])
            try:
                self._statistics_of(site).update(new, positions)
            except LlmWsaeError as error:
                raise LlmWsaeError(
                    f"{site}, shard {index:05d}: {error}; the shards before it are complete; the "
                    "model may do better in float32 (--model-dtype float32)"
                ) from error
        self._num_rows = added.stop
        if sum(len(c.ids) for c in self._contexts) == self._manifest.shard_contexts(index):
            self._write_shard(index)

    def _statistics_of(self, site: str) -> Statistics:
        if site not in self._statistics:
            self._statistics[site] = Statistics(
                self._manifest.d_in,
                self._manifest.context_size,
                sampled_rows(self._manifest.contexts_per_shard * self._manifest.context_size),
            )
        return self._statistics[site]

    def _write_shard(self, index: int) -> None:
        files, checks = [tokens_path(index)], {}
        save_contexts(self._folder / files[0], self._contexts)
        for site in self._manifest.sites:
            path, statistics_path = shard_paths(index, site)
            rows = self._rows[site][: self._num_rows]
            save_tensors(self._folder / path, {"activations": rows})
            row_bytes = rows.shape[1] * rows.itemsize
            checks[path] = packed(crc32s(bytes_of(rows), ROWS_PER_CHECK * row_bytes))
            statistics = self._statistics_of(site)
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
        self._contexts, self._statistics, self._num_rows = [], {}, 0
