"""One store from several that separate jobs harvested, each from text of its own.

No activation is computed again: the shards are copied as they are, one store after the other, under
new numbers, and the statistics of all rows are merged from those of the shards. So are the
covariance sums, or one pass over the rows measures them. ``Manifest.parts`` says which harvests
they come from.

A merge is written as a harvest is: first a manifest that says that the store is not complete, the
record of a shard after its files. A merge that is killed at any instant leaves nothing that opens
as a store, and the same merge resumes with the first shard that is missing.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llm_wsae.data.config import PackConfig
from llm_wsae.data.covariance import merge_second_moments
from llm_wsae.data.finishing import finish_store
from llm_wsae.data.manifest import MANIFEST, RECORDS, Manifest, Part, save_record
from llm_wsae.data.packing import NO_DOCUMENT
from llm_wsae.data.resume import begin_or_resume, check_empty
from llm_wsae.data.shard_record import REPAIR, TOKENS, FileRecord, ShardRecord, all_paths
from llm_wsae.data.store import ActivationStore
from llm_wsae.data.stored_measurement import MEASUREMENTS
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.files import folder_lock, remove_partials, sha256, write_atomic
from llm_wsae.outputs import check_free
from llm_wsae.outside import number
from llm_wsae.provenance import version_of

CHANCE = 0.01
"""Share of a store's documents that may be in another one: every large corpus repeats some."""
_BLOCK = 4 << 20  # bytes


def merge(stores: Sequence[Path | str], out: Path | str, link: bool = False) -> ActivationStore:
    """Make one store from several of one model, with the same sites and the same settings.

    The rows are those of the first store, then of the second, and so on, byte for byte. Each file
    is compared with its checksum while it is copied. ``link`` makes hard links instead of copies.
    The same call resumes a merge that was stopped or killed. The stores are only read.

    The statistics of all rows are merged in float64 from those of the shards, as a harvest does.
    Compared with one harvest of the same rows: the number of rows, minima, maxima and the histogram
    of norms (and so the median norm, the massive threshold and what lies above it) are equal. The
    moments differ by rounding alone, since at most 512 rows at a time are summed in float32, and
    these runs end elsewhere: means by 1e-8 of a standard deviation, variances by 2e-8, skewness and
    kurtosis by 1e-6 (60,000 rows of SmolLM2-135M). The sample is another one, as uniform. Where
    every store but the last fills its last shard, all of it is equal to the last bit.

    The covariance sums of a site are merged too, in float64, unless the massive threshold of all
    rows may leave out other rows of a store than its own did. Then, and where a store of an earlier
    version lacks them, they are measured in one pass over all rows. The two differ as the moments
    do, by 1e-7 of the product of two standard deviations, since at most 4096 rows at a time are
    multiplied in float32.

    Raises UsageError for fewer than two stores, or one that is named twice; LlmWsaeError if a store
    is unfinished or damaged, does not fit the first, is of another part of its corpus or holds the
    same text as another, the disk is too small, or the folder holds something else.
    """
    out = Path(out)
    folders = [Path(folder) for folder in stores]
    _check_names(folders, out)
    if not (out / MANIFEST).is_file():
        check_empty(out)
    opened = [ActivationStore.open(folder) for folder in folders]
    for store in opened:
        _check_fit(store, opened[0])
        for path, record in store.manifest.all_files().items():
            if not record.has_size(store.folder / path):
                record.check(store.folder / path)  # says what is wrong
    _check_parts(opened)
    _check_texts(opened)
    manifest = _manifest_of(opened)
    sources = [(s, index) for s in opened for index in range(len(s.manifest.shards))]
    if not link:
        lacking = sum(
            record.bytes
            for index, (store, shard) in enumerate(sources)
            for path, record in _renumbered(store, shard, index).files.items()
            if not record.has_size(out / path)
        )
        check_free(out, lacking, "or share the files of the stores with --link")
    with folder_lock(out, "activation store"):
        found, whole = begin_or_resume(out, manifest)
        remove_partials(out, TOKENS, RECORDS, MEASUREMENTS, *manifest.sites)
        if found.complete:
            tqdm.write(f"{out} is already complete", file=sys.stderr)
        else:
            _copy_shards(sources, out, set(whole), link)
            finish_store(out, Manifest.load(out))
        merged = ActivationStore.open(out)
        merge_second_moments(opened, merged)
    return merged


def _check_names(folders: Sequence[Path], out: Path) -> None:
    if len(folders) < 2:
        raise UsageError("there is nothing to merge; name at least two stores")
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise UsageError(f"{folder} is listed twice; name each store once")
        if place == out.resolve():
            raise UsageError(
                f"{out} is one of the stores to merge; choose another folder for --out"
            )


def _check_fit(store: ActivationStore, first: ActivationStore) -> None:
    """Raises LlmWsaeError unless rows of both can be in one store."""
    if clauses := _in_common(store.manifest).differences(_in_common(first.manifest)):
        raise LlmWsaeError(
            f"{store.folder} does not fit {first.folder} ({'; '.join(clauses)}); merge stores of "
            "one model with the same sites and settings"
        )


def _in_common(manifest: Manifest) -> Manifest:
    """The manifest with nothing in which stores of one merge may differ: a model may have several
    names, and how many contexts go through it at a time depends on the machine."""
    return replace(
        manifest,
        model={key: manifest.model[key] for key in ("weights_sha256", "dtype")},
        corpus={},
        sites=sorted(manifest.sites),
        packing=PackConfig(**manifest.packing).packing(),
        contexts_per_batch=1,
        contexts_per_shard=1,
        parts=[],
    )


def _check_parts(stores: Sequence[ActivationStore]) -> None:
    """Raises LlmWsaeError unless all stores are of one part of their corpora: what was held out of
    one must not be trained on with the others."""
    corpora = [store.manifest.corpus for store in stores]
    parts = [corpus.get("part") for corpus in corpora]
    for store, corpus, part in zip(stores, corpora, parts, strict=True):
        if part != parts[0]:
            raise LlmWsaeError(
                f"{store.folder} holds the {part} part of {corpus['name']}, but "
                f"{stores[0].folder} the {parts[0]} part of {corpora[0]['name']}, and what is held "
                "out of a text must stay apart; harvest one again with --part "
                f"{'train' if 'train' in parts else 'heldout'}, or all with --part all to keep "
                "nothing apart"
            )


# --- The same text


def _check_texts(stores: Sequence[ActivationStore]) -> None:
    """Raises LlmWsaeError if two stores hold the same text, as far as this can be told.

    They do if both begin the same part of a corpus, or if more than ``CHANCE`` of the documents of
    one are in the other: with the same name and, in the store, the same tokens.
    """
    for one, other in combinations(stores, 2):
        theirs = [part.corpus for part in _parts_of(other)]
        for corpus in (part.corpus for part in _parts_of(one)):
            if corpus in theirs:
                what = f"the beginning of the {corpus.get('part')} part of {corpus['name']}"
                raise _same_text(one, other, what)
    documents = [
        np.unique(np.fromiter((digest for _, digest in _documents(store)), dtype=np.uint64))
        for store in stores
    ]
    for pair in combinations(zip(stores, documents, strict=True), 2):
        (one, many), (other, few) = sorted(pair, key=lambda each: len(each[1]), reverse=True)
        shared = set(np.intersect1d(many, few, assume_unique=True).tolist())
        if len(shared) > CHANCE * len(few):
            name = next(name for name, digest in _documents(other) if digest in shared)
            what = f"{len(shared):,} of the {len(few):,} documents of {other.folder}, such as"
            raise _same_text(one, other, f"{what} {name!r}")


def _same_text(one: ActivationStore, other: ActivationStore, what: str) -> LlmWsaeError:
    return LlmWsaeError(
        f"{one.folder} and {other.folder} hold the same text ({what}), whose rows would count "
        "twice; harvest another text for one of them"
    )


def _documents(store: ActivationStore) -> Iterator[tuple[str, int]]:
    """Name and digest of each document of which there are tokens."""
    current, name, digest = NO_DOCUMENT, "", None
    shards = range(len(store.manifest.shards))
    for shard in tqdm(shards, desc="texts", unit="shard", leave=False, delay=1):
        contexts = store.contexts(shard)
        own = contexts.document != NO_DOCUMENT
        document, ids = contexts.document[own], contexts.ids[own]
        edges = np.flatnonzero(np.diff(document, prepend=NO_DOCUMENT, append=NO_DOCUMENT))
        for start, stop in pairwise(edges.tolist()):
            if int(document[start]) != current:
                if digest is not None:
                    yield name, int.from_bytes(digest.digest())
                current = int(document[start])
                name = str(contexts.headers.get(current, {}).get("name"))
                digest = hashlib.blake2b(name.encode(errors="replace"), digest_size=8)
            assert digest is not None
            digest.update(ids[start:stop].tobytes())
    if digest is not None:
        yield name, int.from_bytes(digest.digest())


# --- The manifest


def _parts_of(store: ActivationStore) -> list[Part]:
    """The harvests in a store, which may have been merged itself."""
    return store.manifest.parts or [store.manifest.as_part(sha256(store.folder / MANIFEST))]


def _manifest_of(stores: Sequence[ActivationStore]) -> Manifest:
    """The manifest of the merged store before it has a shard."""
    parts = [part for store in stores for part in _parts_of(store)]
    return replace(
        stores[0].manifest,
        package_version=version_of("llm-wsae"),
        corpus=_corpus_of([part.corpus for part in parts]),
        contexts_per_batch=max(part.contexts_per_batch for part in parts),
        contexts_per_shard=max(part.contexts_per_shard for part in parts),
        num_contexts=sum(part.num_contexts for part in parts),
        complete=False,
        statistics={},
        shards=[],
        parts=parts,
    )


def _corpus_of(corpora: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All texts as one corpus, named as ``Corpus.open`` names it: ``a+b``.

    Documents are held out by their names, which are unchanged. So the held-out part of ``a+b`` is
    held out of the merged store too if it was of each; otherwise its part is ``all``.
    """

    def joined(key: str) -> str:
        return "+".join(dict.fromkeys(str(corpus.get(key)) for corpus in corpora))

    def shared(key: str) -> Any:
        values = [corpus.get(key) for corpus in corpora]
        return values[0] if values.count(values[0]) == len(values) else None

    return {
        "name": joined("name"),
        "part": shared("part") or "all",
        "heldout_fraction": min(number(c.get("heldout_fraction")) or 0.0 for c in corpora),
        "text_column": shared("text_column"),
        "fingerprint": joined("fingerprint"),
    }


# --- The shards


def _copy_shards(
    sources: Sequence[tuple[ActivationStore, int]], out: Path, whole: set[int], link: bool
) -> None:
    """Copy the shards that are not whole yet."""
    sizes = [sum(f.bytes for f in s.manifest.shards[shard].files.values()) for s, shard in sources]
    there = sum(sizes[index] for index in whole)
    with tqdm(
        total=sum(sizes),
        initial=there,
        desc="merge",
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
    ) as bar:
        for index, (store, shard) in enumerate(sources):
            if index in whole:
                continue
            record = _renumbered(store, shard, index)
            paths = all_paths(shard, store.manifest.sites)
            for old, new in zip(paths, all_paths(index, store.manifest.sites), strict=True):
                source, file = store.folder / old, record.files[new]
                write_atomic(out / new, partial(_copy, source, file, link, bar.update))
            save_record(out, index, record)


def _renumbered(store: ActivationStore, shard: int, index: int) -> ShardRecord:
    """The record of a shard under another number."""
    sites, record = store.manifest.sites, store.manifest.shards[shard]
    new = dict(zip(all_paths(shard, sites), all_paths(index, sites), strict=True))
    return replace(
        record,
        files={new[path]: file for path, file in record.files.items()},
        row_checks={new[path]: checks for path, checks in record.row_checks.items()},
    )


def _copy(
    source: Path, record: FileRecord, link: bool, advance: Callable[[int], object], target: Path
) -> None:
    """Copy or link a file. Raises LlmWsaeError if it is not what its record says."""
    if link:
        record.check(source)
        try:
            os.link(source, target)
        except OSError as error:
            raise LlmWsaeError(
                f"{source} cannot be linked ({error.strerror}); omit --link to copy it"
            ) from error
        advance(record.bytes)
        return
    digest, size = hashlib.sha256(), 0
    with open(target, "wb") as file:
        for block in _blocks(source):
            digest.update(block)
            size += file.write(block)
            advance(len(block))
    if FileRecord(size, digest.hexdigest()) != record:
        raise LlmWsaeError(f"{source} is damaged: its checksum does not match; {REPAIR}")


def _blocks(source: Path) -> Iterator[bytes]:
    try:
        with open(source, "rb") as file:
            while block := file.read(_BLOCK):
                yield block
    except OSError as error:
        raise LlmWsaeError(f"cannot read {source}: {error.strerror}; {REPAIR}") from error
