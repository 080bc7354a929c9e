"""Writing an activation store, shard by shard, while the next rows are being computed.

A shard is a fixed number of contexts and a function of its number alone. Its files are written,
synced and hashed first; then the manifest lists it. So a process killed at any instant leaves whole
shards and at most some files that nothing refers to, which the next run overwrites or removes.
"""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.data.manifest import (
    MANIFEST,
    STATISTICS,
    TOKENS,
    FileRecord,
    Manifest,
    ShardRecord,
    shard_paths,
    tokens_path,
)
from llm_wsae.data.tokens import BEGINNING, Contexts, Cursor
from llm_wsae.data.tokens_file import save_contexts
from llm_wsae.errors import LlmWsaeError
from llm_wsae.files import load_tensors, save_tensors, sha256
from llm_wsae.statistics.moments import Statistics

SHARD_SAMPLE_ROWS = 1024  # a shard's share of the sample; the whole store's is larger
_BATCHES_AHEAD = 2


def begin_or_resume(folder: Path, wanted: Manifest) -> Manifest:
    """The manifest to go on from: the folder's own, or ``wanted``, written into an empty folder.

    More tokens than before may be asked for, since a shard depends on its number alone; a last
    shard that was shorter is then made again. Call it under the folder's lock.

    Raises LlmWsaeError if the folder holds something else, another harvest, or more tokens.
    """
    if not (folder / MANIFEST).is_file():
        others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if others:
            raise LlmWsaeError(
                f"{folder} holds other files ({', '.join(sorted(others)[:3])}); choose another "
                "folder for the activation store"
            )
        wanted.save(folder)
        return wanted
    found = Manifest.load(folder)
    if clauses := found.differences(wanted):
        raise LlmWsaeError(
            f"{folder} holds another harvest ({'; '.join(clauses)}); choose another folder, or "
            "the same settings to go on with it"
        )
    if found.contexts_done > wanted.num_contexts:
        raise LlmWsaeError(
            f"{folder} already holds {found.contexts_done * found.context_size:,} tokens, more "
            f"than the {wanted.num_contexts * found.context_size:,} asked for; choose another "
            "folder, or ask for at least as many"
        )
    if found.num_contexts == wanted.num_contexts and found.complete:
        return found
    found.num_contexts = wanted.num_contexts
    whole = [s for i, s in enumerate(found.shards) if s.contexts == found.shard_contexts(i)]
    assert found.shards[: len(whole)] == whole
    found.shards, found.statistics, found.complete = whole, {}, False
    found.save(folder)
    _remove_unlisted(folder, found)
    return found


class StoreWriter:
    """Adds batches of contexts and their rows to a store; use it as a context manager."""

    def __init__(self, folder: Path, manifest: Manifest):
        """Go on with the folder's manifest, as ``begin_or_resume`` gave it."""
        self._folder = folder
        self._manifest = manifest
        # One core for the writer (the setting is the thread's own): were its operations spread over
        # all cores, each would wait for the forward pass, and the forward pass for it.
        self._pool = ThreadPoolExecutor(1, "store-writer", lambda: torch.set_num_threads(1))
        self._running: deque[Future] = deque()
        self._broken = False
        self._contexts: list[Contexts] = []
        # One buffer a site for the rows of a shard, used again for the next: fresh memory of this
        # size costs more than all the copying into it.
        shape = (manifest.contexts_per_shard * manifest.context_size, manifest.d_in)
        dtype = getattr(torch, manifest.dtype)
        self._rows = {site: torch.empty(shape, dtype=dtype) for site in manifest.sites}
        self._num_rows = 0
        self._statistics: dict[str, Statistics] = {}

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, contexts: Contexts, rows: Mapping[str, Float[Tensor, "rows d_in"]]) -> None:
        """Take the next batch: its contexts, and the rows of their kept positions by site.

        The work is done in the background, at most a few batches behind; its errors are raised by
        a later call. Raises LlmWsaeError if a row is not finite or the disk is full; nothing of
        that shard is written then.
        """
        self._submit(lambda: self._add(contexts, rows))

    def finish(self) -> None:
        """Write what remains: the last shard, the statistics of all rows, the final manifest."""
        self._submit(self._finish)
        while self._running:
            self._running.popleft().result()

    def _submit(self, work: Callable[[], None]) -> None:
        while len(self._running) >= _BATCHES_AHEAD:
            self._running.popleft().result()
        self._running.append(self._pool.submit(self._unless_broken, work))

    def _unless_broken(self, work: Callable[[], None]) -> None:
        # Batches that were waiting when one failed must not complete its shard without it.
        if not self._broken:
            self._broken = True
            work()
            self._broken = False

    def _add(self, contexts: Contexts, rows: Mapping[str, Tensor]) -> None:
        self._contexts.append(contexts)
        index = len(self._manifest.shards)
        positions = torch.from_numpy(contexts.keep).nonzero()[:, 1]
        added = slice(self._num_rows, self._num_rows + len(positions))
        for site in self._manifest.sites:
            new = self._rows[site][added].copy_(rows[site])
            try:
                self._statistics_of(site).update(new, positions)
            except LlmWsaeError as error:
                raise LlmWsaeError(
                    f"{site}, shard {index:05d}: {error}; the shards before it are whole, and a "
                    "float32 model may do better"
                ) from error
        self._num_rows = added.stop
        if sum(len(c.ids) for c in self._contexts) == self._manifest.shard_contexts(index):
            self._write_shard(index)

    def _statistics_of(self, site: str) -> Statistics:
        if site not in self._statistics:
            self._statistics[site] = Statistics(
                self._manifest.d_in, self._manifest.context_size, SHARD_SAMPLE_ROWS
            )
        return self._statistics[site]

    def _write_shard(self, index: int) -> None:
        files = [tokens_path(index)]
        save_contexts(self._folder / files[0], self._contexts)
        for site, (path, statistics_path) in shard_paths(index, self._manifest.sites).items():
            rows = self._rows[site][: self._num_rows]
            save_tensors(self._folder / path, {"activations": rows})
            statistics = self._statistics_of(site)
            save_tensors(self._folder / statistics_path, statistics.to_tensors())
            files += [path, statistics_path]
        record = ShardRecord(
            contexts=sum(len(c.ids) for c in self._contexts),
            rows=self._num_rows,
            first=tuple(self._contexts[0].first),
            next=tuple(self._contexts[-1].next),
            files={path: _file_record(self._folder / path) for path in files},
        )
        self._manifest.shards.append(record)
        self._manifest.save(self._folder)
        self._contexts, self._statistics, self._num_rows = [], {}, 0

    def _finish(self) -> None:
        assert not self._contexts and self._manifest.contexts_done == self._manifest.num_contexts
        for site in self._manifest.sites:
            merged = Statistics(self._manifest.d_in, self._manifest.context_size)
            for index in range(len(self._manifest.shards)):
                path = self._folder / shard_paths(index, [site])[site][1]
                tensors, _ = load_tensors(path, "statistics of a shard")
                merged.merge(Statistics.from_tensors(tensors))
            path = f"{site}/{STATISTICS}"
            save_tensors(self._folder / path, merged.to_tensors())
            self._manifest.statistics[path] = _file_record(self._folder / path)
        self._manifest.complete = True
        self._manifest.save(self._folder)


def next_cursor(manifest: Manifest) -> Cursor:
    """Where in the corpus the first shard that is not there begins."""
    return Cursor(*manifest.shards[-1].next) if manifest.shards else BEGINNING


def _file_record(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, sha256(path))


def _remove_unlisted(folder: Path, manifest: Manifest) -> None:
    """Delete shard files that a killed run wrote but never listed."""
    listed = {folder / path for path in manifest.all_files()}
    for name in (TOKENS, *manifest.sites):
        for path in (folder / name).glob("*.safetensors"):
            if path not in listed:
                path.unlink()
