"""Writing an activation store, shard by shard, while the next rows are being computed.

A shard is a fixed number of contexts and a function of its index alone. Its files are written,
synced and hashed first, its record last. So a process killed at any instant leaves complete shards
and perhaps some files that nothing refers to, which the next run overwrites or removes.
"""

import shutil
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.artifact.artifact import FileRecord
from llm_wsae.artifact.files import save_tensors
from llm_wsae.data.manifest import (
    RECORDS,
    STATISTICS,
    Manifest,
    ShardRecord,
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
        """Wait until all that was added is written, but for so many batches."""
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
