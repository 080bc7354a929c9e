"""Reading an activation store: rows of a site, their statistics, and the text behind each row.

manifest.json                      what the rows are; every file's size and checksum
tokens/00000.safetensors           ids, keep, document, offset [contexts, positions]
blocks.9.hook_resid_post/
    00000.safetensors              activations [rows, d_in]: the kept positions, in order
    00000.statistics.safetensors   their statistics
    statistics.safetensors         the statistics of all rows
evidence/                          what was measured for weight rules

Machines that share no folder each harvest other text into a store of their own. ``open_stores``
reads them as one, and copies nothing: all rows of the first, then those of the second, and so on.
"""

import bisect
import functools
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.artifact.artifact import differences
from llm_wsae.data.manifest import (
    REPAIR,
    ROWS_PER_CHECK,
    STATISTICS,
    Manifest,
    ShardRecord,
    bytes_of,
    complete_shards,
    read_row_checks,
    read_statistics,
    shard_paths,
    tokens_path,
)
from llm_wsae.data.packing import NO_DOCUMENT, Contexts, load_contexts
from llm_wsae.data.rows import WINDOW_BYTES, SiteRows, StoredMeasurement, shuffled_batches
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.machine.processes import join, progress
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import SecondMoment, Statistics
from llm_wsae.statistics.uncertainty import TextSize

MEASUREMENTS = "evidence"
_SHARDS_OF_TOKENS_KEPT = 8
_CONTEXTS_AT_ONCE = 8  # of the text that is read for a measurement
_PARTS = 16  # of the rows; as many processes at most share the work of the covariance
_ROWS_AT_ONCE = 16_384


class _RowFile:
    """A shard's rows of one site, one block in its file, read into the caller's memory. (The pages
    of a mapped file would count as the process's memory, and a damaged one would end it with a
    signal.)

    They are compared with their checksums when they are first read: a training never waits for a
    check of the store, and reads nothing twice.
    """

    def __init__(self, folder: Path, name: str, record: ShardRecord):
        self.num_rows = record.rows
        self._path, self._bytes = folder / name, record.files[name].bytes
        self._checks = read_row_checks(record.row_checks[name])
        self._proved = np.zeros(len(self._checks), dtype=bool)
        if self._path.is_fifo():  # which would be waited for
            raise LlmWsaeError(f"{self._path} is no file; {REPAIR}")

    def read(self, first: int, out: Tensor) -> None:
        """Fill ``out`` with rows from ``first``."""
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
        try:
            with open(self._path, "rb") as file:
                file.seek(self._bytes - (self.num_rows - first) * row_bytes)  # behind the header
                read = file.readinto(buffer)
        except OSError as error:
            raise LlmWsaeError(f"cannot read {self._path}: {error.strerror}") from error
        if read < len(buffer):
            raise LlmWsaeError(f"{self._path} is truncated; {REPAIR}")


class RowReader:
    """The rows of one site, as one sequence over the shards of a store, or of several."""

    def __init__(self, files: Sequence[_RowFile], d_in: int, dtype: torch.dtype):
        self._files, self._d_in, self.dtype = files, d_in, dtype
        self._ends = list(accumulate(file.num_rows for file in files))
        self.num_rows = self._ends[-1] if self._ends else 0
        self.row_bytes = d_in * dtype.itemsize

    def read(self, start: int, out: Tensor) -> None:
        """Fill ``out [rows, d_in]``, contiguous and of the store's dtype, with rows from ``start``.
        Raises LlmWsaeError, naming the file, if it cannot be read or is not what was written."""
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


class Located(NamedTuple):
    """Where rows come from."""

    context: Int[Tensor, " rows"]  # its number in the store
    position: Int[Tensor, " rows"]
    document: Int[Tensor, " rows"]  # its number in the corpus; -1 for a token of none
    offset: Int[Tensor, " rows"]  # of the token in its section
    ids: Int[Tensor, "rows positions"]  # of the context


@dataclass(frozen=True)
class _Shard:
    folder: Path
    number: int  # in its own store
    record: ShardRecord
    documents_before: int  # in the stores before its own


class ActivationStore(SiteRows):
    """A complete activation store on disk, or several read one after the other; see ``open`` and
    ``open_stores``."""

    in_step = False
    model = None

    def __init__(self, folder: Path, manifest: Manifest, *others: "ActivationStore"):
        self.folder: Path = folder
        """Of the first store."""
        self._alone = [(folder, manifest), *((one.folder, one.manifest) for one in others)]
        self.manifest: Manifest = _joined([one for _, one in self._alone])
        self.sites = [Site.parse(name) for name in manifest.sites]
        self.d_in = manifest.d_in
        self.num_rows: int = self.manifest.num_rows
        self.context_size = manifest.context_size
        self.prepends_bos = manifest.bos_token_id is not None
        self._shards, before = [], 0
        for place, own in self._alone:
            self._shards += [_Shard(place, n, one, before) for n, one in enumerate(own.shards)]
            # a section is at most of one document, and the next one counts once it has begun
            before += own.shards[-1].next[0] + 1
        self._row_ends = list(accumulate(shard.record.rows for shard in self._shards))
        self._context_ends = list(accumulate(shard.record.contexts for shard in self._shards))
        self.contexts = functools.lru_cache(_SHARDS_OF_TOKENS_KEPT)(self._load_contexts)
        """The contexts of a shard, with the names and labels of their documents."""

    @classmethod
    def open(cls, folder: Path | str) -> "ActivationStore":
        """Raises LlmWsaeError if there is no store, it has another format, or it is unfinished."""
        folder = Path(folder)
        manifest = Manifest.load(folder)
        if not manifest.complete:
            there = sum(shard.contexts for shard in complete_shards(folder, manifest).values())
            raise LlmWsaeError(
                f"the store {folder} is not complete: {there} of {manifest.num_contexts} contexts "
                "are there; run its harvest again to resume it"
            )
        return cls(folder, manifest)

    def check_model(self, identity: dict[str, Any]) -> None:
        """Raises LlmWsaeError if a model of that ``identity()`` did not make this store."""
        mine = self.manifest.model
        for key, what in (("weights_sha256", "weights"), ("dtype", "dtype")):
            if mine.get(key) != identity.get(key):
                way_out = f"; load it with --model-dtype {mine[key]}" if key == "dtype" else ""
                raise LlmWsaeError(
                    f"the store {self.folder} was made by {mine.get('name')} in {mine['dtype']}, "
                    f"not by {identity.get('name')} in {identity.get('dtype')} (other {what})"
                    f"{way_out}"
                )

    # --- Rows

    def batches(
        self,
        sites: Sequence[Site],
        batch_size: int,
        seed: int,
        start: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Float[Tensor, "rows d_in"], ...]]:
        readers = [self.reader(site) for site in sites]
        each = [
            shuffled_batches(one, batch_size, seed, start, WINDOW_BYTES, part) for one in readers
        ]
        return zip(*each, strict=True)

    def rows(self, site: Site, start: int, stop: int) -> Float[Tensor, "rows d_in"]:
        """Rows ``start`` to ``stop`` in the order of the text, in the store's dtype."""
        if not 0 <= start <= stop <= self.num_rows:
            raise UsageError(f"there are no rows {start} to {stop}; the store has {self.num_rows}")
        return self.reader(site).rows(start, stop)

    def reader(self, site: Site) -> RowReader:
        """A reader of a site's rows; over all its calls each row is compared with its checksum
        once. Raises UsageError if the store lacks the site."""
        name = self._name(site)
        files = [
            _RowFile(shard.folder, shard_paths(shard.number, name)[0], shard.record)
            for shard in self._shards
        ]
        return RowReader(files, self.d_in, getattr(torch, self.manifest.dtype))

    def identity(self, site: Site) -> dict[str, Any]:
        several = {"stores": len(self._alone)} if len(self._alone) > 1 else {}
        return {
            "kind": "store",
            "site": self._name(site),
            "model": self.manifest.model,
            "corpus": self.manifest.corpus,
            "packing": self.manifest.packing,
            "dtype": self.manifest.dtype,
            "num_rows": self.num_rows,
            "sha256": self._digest(site),
            **several,
            "window_bytes": WINDOW_BYTES,
        }

    def _digest(self, site: Site) -> str:
        """Of the digests of the site's files, or of those of several stores."""
        digests = []
        for _, manifest in self._alone:
            files = manifest.all_files().items()
            own = {path: one.sha256 for path, one in files if path.startswith(f"{site}/")}
            digests.append(_sha256_of(own))
        return digests[0] if len(digests) == 1 else _sha256_of(digests)

    def _name(self, site: Site) -> str:
        if site not in self.sites:
            raise UsageError(
                f"the store {self.folder} has no {site}; {nearest(str(site), self.manifest.sites)}"
            )
        return str(site)

    # --- What is known of the rows

    def statistics(self, site: Site) -> Statistics:
        """The statistics of all rows of a site. Raises LlmWsaeError if their file is damaged."""
        name = f"{self._name(site)}/{STATISTICS}"
        first, *others = (
            read_statistics(folder / name, manifest.statistics[name])
            for folder, manifest in self._alone
        )
        for other in others:
            first.merge(other)
        return first

    def second_moment(self, site: Site) -> SecondMoment:
        """The covariance sums of the rows that are not massive, by the median norm of all: those
        kept in the store, or else measured in one more pass, and kept."""
        kept, processes = self.evidence(site, "second_moment"), join()
        # parts are merged in the order of the rows, whichever process sums them
        tensors = processes.lead(lambda: kept.read() or self._added_up(site))
        if tensors is not None:
            return SecondMoment.from_tensors(tensors)
        found = SecondMoment(self.d_in)
        mine = self._sums_of_parts(site, range(processes.rank, _PARTS, processes.size))
        for _ in range(0, _PARTS, processes.size):
            for part in processes.gather(next(mine, None)):
                if part is not None:
                    found.merge(part)
        kept.write(found.to_tensors())
        return found

    def evidence(self, site: Site, need: str, **settings: Any) -> StoredMeasurement:
        """A measurement of these rows, kept beside them; of several stores, in the first one."""
        digest = self._digest(site)
        own = f".{digest[:16]}" if len(self._alone) > 1 else ""
        path = self.folder / MEASUREMENTS / f"{site}.{need}{own}.safetensors"
        return StoredMeasurement(path, {"rows": digest, **settings})

    def _added_up(self, site: Site) -> dict[str, Tensor] | None:
        """The sums that several stores keep, together; None if all rows together would have other
        massive ones."""
        if len(self._alone) == 1:
            return None
        whole, total = self.statistics(site), SecondMoment(self.d_in)
        for one in (ActivationStore(*alone) for alone in self._alone):
            tensors = one.evidence(site, "second_moment").read()
            if tensors is None or not one.statistics(site).same_are_massive(whole):
                return None
            total.merge(SecondMoment.from_tensors(tensors))
        return total.to_tensors()

    def _sums_of_parts(self, site: Site, parts: Sequence[int]) -> Iterator[SecondMoment]:
        """The sums over each of these parts of the rows."""
        threshold, reader = self.statistics(site).massive_threshold, self.reader(site)
        ends = [self.num_rows * number // _PARTS for number in range(_PARTS + 1)]
        total = sum(ends[part + 1] - ends[part] for part in parts)
        with progress("covariance", total, "row") as bar:
            for part in parts:
                found = SecondMoment(self.d_in)
                for start in range(ends[part], ends[part + 1], _ROWS_AT_ONCE):
                    rows = reader.rows(start, min(start + _ROWS_AT_ONCE, ends[part + 1])).float()
                    found.update(rows[rows.norm(dim=1) <= threshold])
                    bar.update(len(rows))
                yield found

    # --- The text behind the rows

    def first_context(self, shard: int) -> int:
        """Number of the first context of a shard in the store."""
        return self._context_ends[shard - 1] if shard else 0

    def place_of_context(self, number: int) -> tuple[int, int]:
        """The shard that a context is in, and its place there."""
        shard = bisect.bisect_right(self._context_ends, number)
        return shard, number - self.first_context(shard)

    def locate(self, rows: Int[Tensor, " rows"]) -> Located:
        """Where rows come from, by their numbers. Raises UsageError for one that is not there."""
        numbers = rows.numpy()
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < self.num_rows):
            raise UsageError(f"a row number is not one of the store's {self.num_rows} rows")
        found = np.empty((4, len(numbers)), dtype=np.int64)
        ids = np.empty((len(numbers), self.context_size), dtype=np.int32)
        shards = np.searchsorted(self._row_ends, numbers, side="right")
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            first = self._row_ends[shard - 1] if shard else 0
            contexts = self.contexts(shard)
            at = tuple(a[numbers[here] - first] for a in np.nonzero(contexts.keep))
            found[0, here], found[1, here] = at[0] + self.first_context(shard), at[1]
            found[2, here], found[3, here] = contexts.document[at], contexts.offset[at]
            ids[here] = contexts.ids[at[0]]
        return Located._make([*torch.from_numpy(found), torch.from_numpy(ids)])

    def document(self, row: int) -> dict[str, Any]:
        """Name and labels of the document that a row comes from; empty if there is none."""
        where = self.locate(torch.tensor([row]))
        shard, _ = self.place_of_context(int(where.context))
        return self.contexts(shard).headers.get(int(where.document), {})

    def text_size(self, rows: int | None = None) -> TextSize:
        """Of how many documents the first ``rows`` rows are, or all."""
        wanted = self.num_rows if rows is None else min(rows, self.num_rows)
        shards = range(int(np.searchsorted(self._row_ends, wanted)) + 1)
        documents = [(c := self.contexts(shard)).document[c.keep] for shard in shards]
        return TextSize.of(np.concatenate(documents)[:wanted])

    def some_text(self, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As ``SiteRows.some_text``, of contexts spread evenly over the store, a few at a time."""
        total = self.manifest.num_contexts
        wanted = max(1, min(total, -(-min(tokens, self.num_rows) * total // self.num_rows)))
        chosen = torch.linspace(0, total - 1, wanted, dtype=torch.float64).round().long()
        for shard in range(len(self._shards)):
            contexts = self.contexts(shard)
            ids, keep = torch.from_numpy(contexts.ids), torch.from_numpy(contexts.keep)
            first = self.first_context(shard)
            here = chosen[(chosen >= first) & (chosen < first + len(keep))] - first
            for batch in here.split(_CONTEXTS_AT_ONCE) if len(here) else ():
                yield ids[batch].long(), keep[batch]

    def _load_contexts(self, number: int) -> Contexts:
        shard, name = self._shards[number], tokens_path(self._shards[number].number)
        shard.record.files[name].check(shard.folder / name, REPAIR)
        contexts = load_contexts(shard.folder / name, shard.record.first, shard.record.next)
        own, before = contexts.document, shard.documents_before
        return contexts._replace(
            document=np.where(own >= 0, own + np.int32(before), np.int32(NO_DOCUMENT)),
            headers={document + before: header for document, header in contexts.headers.items()},
        )


def open_stores(folders: Sequence[Path | str]) -> ActivationStore:
    """Open a store, or several of one model, with the same sites and settings, as one.

    Rows, and so batches, are byte for byte those of one store with the rows of all, in the order of
    the folders. Statistics are merged: moments differ by rounding, and the sample is another one,
    as uniform.

    Raises LlmWsaeError if a store is unfinished, does not fit the first, or is of another part of
    its corpus or of the same corpus.
    """
    if not folders:
        raise UsageError("name at least one activation store")
    first, *others = stores = [ActivationStore.open(folder) for folder in folders]
    for store in others:
        owners = ("the first store", "this one")
        if clauses := differences(_in_common(first), _in_common(store), owners):
            raise LlmWsaeError(
                f"{store.folder} does not fit {first.folder} ({clauses}); use stores of one model "
                "with the same sites and settings, and the same --part of their texts"
            )
    for one, other in combinations(stores, 2):
        if one.manifest.corpus == other.manifest.corpus:
            raise LlmWsaeError(
                f"{one.folder} and {other.folder} hold the same text (the beginning of "
                f"{one.manifest.corpus['name']}), whose rows would count twice; harvest another "
                "text for one of them"
            )
    return ActivationStore(first.folder, first.manifest, *others)


def _in_common(store: ActivationStore) -> dict[str, Any]:
    """What stores must have in common. A model may have several names."""
    manifest = store.manifest
    names = ("sites", "dtype", "d_in", "bos_token_id", "packing")
    return {
        "model": {key: manifest.model[key] for key in ("weights_sha256", "dtype")},
        "part": manifest.corpus.get("part"),  # what was held out of one would be trained on
        **{name: getattr(manifest, name) for name in names},
    }


def _joined(manifests: Sequence[Manifest]) -> Manifest:
    """The manifest of several stores as one, which holds out as much as the one that does least."""
    if len(manifests) == 1:
        return manifests[0]
    corpora = [manifest.corpus for manifest in manifests]
    corpus = dict(corpora[0])
    for key in ("name", "fingerprint"):  # as ``Corpus.open`` names several texts
        corpus[key] = "+".join(dict.fromkeys(str(one[key]) for one in corpora))
    corpus["heldout_fraction"] = min(one["heldout_fraction"] for one in corpora)
    contexts = sum(manifest.num_contexts for manifest in manifests)
    shards = [shard for manifest in manifests for shard in manifest.shards]
    first = manifests[0]
    return replace(first, corpus=corpus, num_contexts=contexts, shards=shards, statistics={})


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
