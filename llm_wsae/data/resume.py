"""Which shards of a store exist and which are missing, and the contexts of the missing ones.

A shard is a function of its index alone, so a process can make it without knowing the others. Only
where it begins in the text has to be found: by packing the text before it, or from the record of an
earlier shard.
"""

import bisect
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llm_wsae.artifact.artifact import FileRecord
from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.manifest import (
    RECORDS,
    TOKENS,
    Manifest,
    ShardRecord,
    complete_shards,
    save_record,
    store_in,
)
from llm_wsae.data.packing import BEGINNING, Contexts, Cursor, Packer
from llm_wsae.errors import LlmWsaeError

_BYTES_PER_TOKEN = 8  # ordinary text has fewer


def begin_or_resume(folder: Path, wanted: Manifest) -> tuple[Manifest, dict[int, ShardRecord]]:
    """The manifest to resume from, and the complete shards by index.

    The manifest is the folder's, or ``wanted``, written to an empty folder. More tokens than before
    may be requested, since a shard depends on its index alone; a last shard that was shorter is
    then rebuilt. So is a shard of which a file is missing or has another size, or whose tokens
    changed. Call this under the folder's lock.

    Raises LlmWsaeError if the folder holds something else, another harvest, or more tokens.
    """
    store = store_in(folder)
    if not store.is_begun():
        store.check_place()
        wanted.save(folder)
        return wanted, {}
    found = Manifest.load(folder)
    store.check_request(found.request(), wanted.request())
    shards = complete_shards(folder, found)
    there = {i: shard for i, shard in shards.items() if _are_there(folder, shard.files)}
    per_shard = found.contexts_per_shard
    reached = max((i * per_shard + shard.contexts for i, shard in shards.items()), default=0)
    if reached > wanted.num_contexts:
        raise LlmWsaeError(
            f"{folder} already holds {reached * found.context_size:,} tokens, more than the "
            f"{wanted.num_contexts * found.context_size:,} requested; choose another folder, or "
            "request at least as many"
        )
    if found.complete:
        # A process killed at the very end may have left records that its manifest holds already.
        shutil.rmtree(folder / RECORDS, ignore_errors=True)
        intact = len(there) == len(shards) and _are_there(folder, found.statistics)
        if intact and found.num_contexts == wanted.num_contexts:
            return found, shards
    found.num_contexts = wanted.num_contexts
    whole = {i: shard for i, shard in there.items() if shard.contexts == found.shard_contexts(i)}
    for i in whole if found.complete else ():  # back to records of their own
        save_record(folder, i, whole[i])
    found.shards, found.statistics, found.complete = [], {}, False
    found.save(folder)
    _remove_unlisted(folder, found, whole)
    return found, whole


def shard_batches(
    packer: Packer,
    corpus: Corpus,
    manifest: Manifest,
    following: Mapping[int, Cursor],
    shards: Sequence[int],
) -> Iterator[tuple[int, Contexts]]:
    """The contexts of the given shards (ascending), one forward pass at a time: (shard, contexts).

    ``following`` says, for shards that were already complete, where the text continues after them;
    what lies between the given shards is packed and skipped. Raises LlmWsaeError if the corpus ends
    before the last of them.
    """
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


def check_size(packer: Packer, corpus: Corpus, config: HarvestConfig) -> None:
    """Raises LlmWsaeError, before any work, if a small corpus has less text than requested.

    A large corpus, or one of unknown size, is not read twice: its end is noticed when it comes.
    """
    wanted = config.num_contexts
    if corpus.num_bytes is None or corpus.num_bytes > config.tokens * _BYTES_PER_TOKEN:
        return
    found = sum(len(block.ids) for block in packer.blocks(corpus, 256, limit=wanted))
    if found < wanted:
        raise too_small(corpus, found, wanted, config.context_size)


def too_small(corpus: Corpus, found: int, wanted: int, context_size: int) -> LlmWsaeError:
    """The error of a corpus that fills ``found`` contexts, fewer than ``wanted``."""
    part = "" if corpus.part == "all" else f"{corpus.part} part of the "
    found, wanted = found * context_size, wanted * context_size
    return LlmWsaeError(
        f"the {part}corpus {corpus.name} fills contexts of {context_size} with {found:,} tokens, "
        f"fewer than the {wanted:,} requested; give more text"
        + (f" or request {found} tokens" if found else " or shorten the contexts")
    )


def _are_there(folder: Path, files: Mapping[str, FileRecord]) -> bool:
    """Whether the files exist and have their sizes, and tokens, which no later step reads, also
    their checksums."""
    return all(
        record.problem(folder / path) is None
        if path.startswith(f"{TOKENS}/")
        else record.has_size(folder / path)
        for path, record in files.items()
    )


def _remove_unlisted(folder: Path, manifest: Manifest, whole: Mapping[int, ShardRecord]) -> None:
    """Delete what a killed run wrote but never recorded, and what must be rebuilt."""
    listed = {folder / path for shard in whole.values() for path in shard.files}
    for name in (TOKENS, *manifest.sites):
        for path in (folder / name).glob("*.safetensors"):
            if path not in listed:
                path.unlink()
    for path in (folder / RECORDS).glob("*.json"):
        if path.stem.isdecimal() and int(path.stem) not in whole:
            path.unlink()
