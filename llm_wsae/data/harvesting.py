"""From text and a model to rows in a store on disk.

The forward pass is the only expensive part, so everything else runs in parallel with it: one thread
tokenises the next contexts ahead, another computes statistics and checksums and writes.

A shard is a fixed number of contexts and a function of its index alone, so a process can make it
without knowing the others. Only where it begins in the text has to be found: by packing the text
before it, or from the record of an earlier shard. A shard's files are written first, its record
last. So a process killed at any instant leaves complete shards and perhaps some files that nothing
refers to, which the next run overwrites or removes.
"""

import bisect
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from llm_wsae.artifact.artifact import FileRecord, check_room
from llm_wsae.artifact.files import remove_partials, save_tensors
from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import BEGINNING, Contexts, Cursor, Packer, save_contexts
from llm_wsae.data.rows import row_checks
from llm_wsae.data.store import (
    MEASUREMENTS,
    RECORDS,
    STATISTICS,
    TOKENS,
    ActivationStore,
    Manifest,
    ShardRecord,
    complete_shards,
    read_statistics,
    save_record,
    shard_paths,
    store_in,
    tokens_path,
)
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.machine.hardware import check_memory
from llm_wsae.machine.processes import Processes, join, progress
from llm_wsae.machine.threads import prefetch
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site, points_of
from llm_wsae.statistics.moments import SAMPLE_ROWS, Statistics

NO_ROWS = "no token of these documents gives a row; lower --drop-positions"
_SAMPLED, _OF_TOKENS = 1024, 32_768
_PACKED_AHEAD, _BATCHES_AHEAD = 4, 2
_BYTES_PER_TOKEN = 8  # ordinary text has fewer


def harvest(
    model: LanguageModel,
    corpus: Corpus,
    sites: Sequence[Site],
    out: Path | str,
    config: HarvestConfig = HarvestConfig(),  # noqa: B008 - frozen
) -> ActivationStore:
    """Write the activations of ``config.tokens`` tokens of a corpus at all sites to a store, with
    their statistics and covariance sums.

    The same call resumes a harvest that was stopped or killed, and ends with the same bytes; a call
    with more tokens extends a store. Under ``torchrun`` each of W processes makes every W-th
    missing shard, in one folder that all can reach; W may change when a harvest is resumed.

    Raises UsageError for a site or context size that the model does not have; LlmWsaeError if the
    folder holds something else or is being written, the corpus is too small (the same call with
    fewer tokens completes what is there), an activation is not finite, or the disk is full.
    """
    out, processes = Path(out), join()
    with processes.together():
        if not sites:
            raise UsageError("there is no site to harvest; name at least one")
        for site in sites:
            model.check_site(site)
        sites = sorted(points_of(sites))
        packer = Packer.for_model(model, config)
        manifest = manifest_of(model, corpus.identity(), sites, config)
        asked = {**manifest.request(), "contexts": manifest.num_contexts}
        processes.check_agreed(asked, "settings of the harvest")
        processes.lead(lambda: _check_size(out, packer, corpus, config, manifest))
        with processes.folder_lock(out, "activation store"):
            following = processes.lead(lambda: _begin(out, manifest))
            if following is not None:
                _write_shards(model, packer, corpus, out, manifest, following, processes)
                processes.lead(lambda: finish_store(out, manifest))
            elif processes.leads:
                tqdm.write(f"{out} is already complete", file=sys.stderr)
        store = ActivationStore.open(out)
        for site in store.sites:
            store.second_moment(site)
    return store


def kept_rows(
    model: LanguageModel, contexts: Contexts, sites: Sequence[Site]
) -> dict[Site, Float[Tensor, "rows d_in"]]:
    """The rows of the kept positions at each site, on the CPU, in the model's dtype."""
    found = model.activations(torch.from_numpy(contexts.ids), sites)
    keep = torch.from_numpy(contexts.keep)
    return {site: found[site][keep.to(found[site].device)].cpu() for site in sites}


def manifest_of(
    model: LanguageModel, corpus: dict[str, Any], sites: Sequence[Site], config: HarvestConfig
) -> Manifest:
    """The manifest of a store before it has a shard; ``corpus`` is the text's identity."""
    auto = "bfloat16" if model.dtype == torch.bfloat16 else "float32"
    return Manifest(
        model=model.identity(),
        corpus=corpus,
        sites=[str(site) for site in sites],
        dtype=auto if config.dtype == "auto" else config.dtype,
        d_in=model.d_model,
        packing=config.packing(),
        bos_token_id=model.bos_token_id if config.prepend_bos else None,
        contexts_per_batch=config.contexts_per_batch,
        contexts_per_shard=config.contexts_per_shard,
        num_contexts=config.num_contexts,
    )


def too_small(corpus: Corpus, found: int, wanted: int, context_size: int) -> LlmWsaeError:
    """The error of a corpus that fills ``found`` contexts, fewer than ``wanted``."""
    part = "" if corpus.part == "all" else f"{corpus.part} part of the "
    found, wanted = found * context_size, wanted * context_size
    return LlmWsaeError(
        f"the {part}corpus {corpus.name} fills contexts of {context_size} with {found:,} tokens, "
        f"fewer than the {wanted:,} requested; give more text"
        + (f" or request {found} tokens" if found else " or shorten the contexts")
    )


def _check_size(
    out: Path, packer: Packer, corpus: Corpus, config: HarvestConfig, wanted: Manifest
) -> None:
    """Raises LlmWsaeError for too little text, UsageError for more than memory or disk could hold,
    before any work. (The end of a large corpus, or of one of unknown size, is noticed when it
    comes.)"""
    store_in(out).check_place()
    if store_in(out).is_begun():
        found = Manifest.load(out)
        if not found.complete or found.num_contexts >= wanted.num_contexts:
            return
    row = len(wanted.sites) * wanted.d_in * getattr(torch, wanted.dtype).itemsize
    shard = wanted.contexts_per_shard * wanted.context_size * row
    check_memory(shard, torch.device("cpu"), "a shard", "lower shard-tokens and batch-tokens")
    if not config.one_document_per_context:  # which may give far fewer rows
        kept = config.context_size - config.drop_positions
        check_room(out, wanted.num_contexts * kept * row, "ask for fewer tokens")
    if corpus.num_bytes is not None and corpus.num_bytes <= config.tokens * _BYTES_PER_TOKEN:
        there = sum(1 for _ in islice(packer.contexts(corpus), wanted.num_contexts))
        if there < wanted.num_contexts:
            raise too_small(corpus, there, wanted.num_contexts, config.context_size)


def _begin(out: Path, wanted: Manifest) -> dict[int, Cursor] | None:
    """Where the text continues after each complete shard; None if the store is complete. Shards
    that are damaged, or shorter than is requested now, are to be rebuilt. Call this under the
    folder's lock.

    Raises LlmWsaeError if the folder holds something else, another harvest, or more tokens.
    """
    store_in(out).check_place()  # again: another run may have begun meanwhile
    whole: dict[int, ShardRecord] = {}
    if store_in(out).is_begun():
        found = Manifest.load(out)
        store_in(out).check_request(found.request(), wanted.request())
        shards = complete_shards(out, found)
        ends = (i * found.contexts_per_shard + one.contexts for i, one in shards.items())
        reached = max(ends, default=0)
        if reached > wanted.num_contexts:
            raise LlmWsaeError(
                f"{out} already holds {reached * found.context_size:,} tokens, more than the "
                f"{wanted.num_contexts * found.context_size:,} requested; choose another folder, "
                "or request at least as many"
            )
        whole = {
            index: shard
            for index, shard in shards.items()
            if shard.contexts == wanted.shard_contexts(index) and _are_there(out, shard.files)
        }
        if found.complete:
            # A process killed at the very end may have left records that its manifest holds.
            shutil.rmtree(out / RECORDS, ignore_errors=True)
            if len(whole) == len(shards) == wanted.num_shards and _are_there(out, found.statistics):
                remove_partials(out, TOKENS, MEASUREMENTS, *wanted.sites)
                return None
            for index, shard in whole.items():  # back to records of their own
                save_record(out, index, shard)
    wanted.save(out)
    _remove_unlisted(out, wanted, whole)
    return {index: Cursor(*shard.next) for index, shard in whole.items()}


def _are_there(folder: Path, files: Mapping[str, FileRecord]) -> bool:
    """Whether the files have their sizes, and tokens, which nothing else reads, their checksums."""
    tokens = [name for name in files if name.startswith(f"{TOKENS}/")]
    there = all(record.has_size(folder / name) for name, record in files.items())
    return there and not any(files[name].problem(folder / name) for name in tokens)


def _remove_unlisted(folder: Path, manifest: Manifest, whole: Mapping[int, ShardRecord]) -> None:
    """Delete what a killed run wrote but never recorded, and what must be rebuilt."""
    remove_partials(folder, TOKENS, RECORDS, MEASUREMENTS, *manifest.sites)
    listed = {folder / path for shard in whole.values() for path in shard.files}
    for name in (TOKENS, *manifest.sites):
        for path in set((folder / name).glob("*.safetensors")) - listed:
            path.unlink()
    for path in (folder / RECORDS).glob("*.json"):
        if path.stem.isdecimal() and int(path.stem) not in whole:
            path.unlink()


def _write_shards(
    model: LanguageModel,
    packer: Packer,
    corpus: Corpus,
    out: Path,
    manifest: Manifest,
    whole: dict[int, Cursor],
    processes: Processes,
) -> None:
    """Write this process's share of the shards that are missing."""
    sites = [Site.parse(name) for name in manifest.sites]
    missing = [i for i in range(manifest.num_shards) if i not in whole]
    own = missing[processes.rank :: processes.size]
    batches = _shard_batches(packer, corpus, manifest, whole, own)
    lacking, there = (
        sum(map(manifest.shard_contexts, shards)) * manifest.context_size for shards in (own, whole)
    )
    bar = progress("harvest", there + lacking, "tok", there)
    with bar, StoreWriter(out, manifest) as writer:
        for shard, contexts in prefetch(batches, _PACKED_AHEAD):
            rows = kept_rows(model, contexts, sites)
            writer.add(shard, contexts, {str(site): rows[site] for site in sites})
            bar.update(contexts.ids.size)
        writer.wait()
        processes.meet()


def _shard_batches(
    packer: Packer,
    corpus: Corpus,
    manifest: Manifest,
    following: Mapping[int, Cursor],
    shards: Sequence[int],
) -> Iterator[tuple[int, Contexts]]:
    """The contexts of the given shards (ascending), one forward pass at a time: (shard, contexts).
    What lies between them and complete shards is packed and skipped. Raises LlmWsaeError if the
    corpus ends."""
    per_shard = manifest.contexts_per_shard
    beginnings = {0: BEGINNING} | {i + 1: cursor for i, cursor in following.items()}
    known = sorted(beginnings)
    at = -1  # the next context of the stream
    stream: Iterator[Contexts] = iter(())
    for shard in shards:
        nearest = known[bisect.bisect_right(known, shard) - 1]
        if nearest * per_shard > at:
            at = nearest * per_shard
            stream = packer.blocks(
                corpus, manifest.contexts_per_batch, beginnings[nearest], manifest.num_contexts - at
            )
        while at < min((shard + 1) * per_shard, manifest.num_contexts):
            contexts = next(stream, None)
            if contexts is None:
                raise too_small(corpus, at, manifest.num_contexts, manifest.context_size)
            if at >= shard * per_shard:
                yield shard, contexts
            at += len(contexts.ids)


class StoreWriter(AbstractContextManager):
    """Adds batches of contexts and their rows to a store; use it as a context manager."""

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder, self._manifest = folder, manifest
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
        # so that a few large shards are sampled as well as many small ones together
        self._sampled = min(SAMPLE_ROWS, _SAMPLED * max(1, tokens // _OF_TOKENS))
        self._begin_shard()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def add(
        self, shard: int, contexts: Contexts, rows: Mapping[str, Float[Tensor, "rows d_in"]]
    ) -> None:
        """Add the next batch of a shard: its contexts and, by site, the rows of kept positions. The
        work is done in the background; a later call raises LlmWsaeError if a row is not finite or
        the disk is full, and that shard is not written."""
        self.wait(_BATCHES_AHEAD - 1)
        self._running.append(self._pool.submit(self._add, shard, contexts, rows))

    def wait(self, ahead: int = 0) -> None:
        """Wait until at most ``ahead`` of the added batches are unwritten."""
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
    Raises LlmWsaeError if there is no row."""
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
