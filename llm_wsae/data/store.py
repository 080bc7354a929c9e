"""An activation store: its manifest, a site's rows, their statistics, and the text behind each row.

manifest.json                      what the rows are; every file's size and checksum
tokens/00000.safetensors           ids, keep, document, offset [contexts, positions]
blocks.9.hook_resid_post/
    00000.safetensors              activations [rows, d_in]: the kept positions, in order
    00000.statistics.safetensors   their statistics
    statistics.safetensors         the statistics of all rows
evidence/                          what was measured for weight rules

During a harvest the manifest says what is being made, and each complete shard has a small record
file of its own, so that several processes can finish shards in any order; a shard without a record
does not exist. At the end the records are moved into the manifest. It holds no times and no paths
of a machine, so that a run that was killed and resumed ends with the same bytes.

Machines that share no folder each harvest other text into a store of their own. ``open_stores``
reads them as one, and copies nothing: all rows of the first, then those of the second, and so on.
"""

import bisect
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.artifact.artifact import Artifact, FileRecord, Record, differences, files_of
from llm_wsae.artifact.files import load_tensors, read_own_json, write_json
from llm_wsae.data.packing import NO_DOCUMENT, Contexts, load_contexts
from llm_wsae.data.rows import (
    REPAIR,
    WINDOW_BYTES,
    RowFile,
    RowReader,
    SiteRows,
    StoredMeasurement,
    shuffled_batches,
)
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.machine.processes import join, progress
from llm_wsae.model.site import Site
from llm_wsae.outside import integer
from llm_wsae.statistics.moments import SecondMoment, Statistics
from llm_wsae.statistics.uncertainty import TextSize

MANIFEST = "manifest.json"
RECORDS = "shards"
TOKENS = "tokens"
STATISTICS = "statistics.safetensors"
MEASUREMENTS = "evidence"
_GROWING = ("num_contexts", "complete", "statistics", "shards")
_SHARDS_OF_TOKENS_KEPT = 8
_CONTEXTS_AT_ONCE = 8  # of the text that is read for a measurement
_PARTS = 16  # of the rows; as many processes at most share the work of the covariance
_ROWS_AT_ONCE = 16_384


@dataclass(frozen=True)
class ShardRecord:
    """One complete shard."""

    contexts: int
    rows: int  # at each site
    first: Sequence[int]  # section and offset at which its first context begins
    next: Sequence[int]  # those at which the next shard begins
    files: dict[str, FileRecord]  # by path within the store
    row_checks: dict[str, str]  # of a file of activations, by its path, what ``row_checks`` gives


@dataclass
class Manifest:
    """Everything about a store except its rows."""

    model: dict[str, Any]  # ``LanguageModel.identity()``
    corpus: dict[str, Any]  # ``Corpus.identity()``
    sites: list[str]  # in the order of a forward pass
    dtype: str  # of the rows, ``bfloat16`` or ``float32``
    d_in: int  # width of the rows
    packing: dict[str, Any]  # ``PackConfig.packing()``
    bos_token_id: int | None  # at the beginning of each context, None if there is none
    contexts_per_batch: int  # in a forward pass; it can change the last bits of the rows
    contexts_per_shard: int  # except in the last one
    num_contexts: int  # that were requested
    complete: bool = False  # whether all contexts and the statistics of all rows are written
    statistics: dict[str, FileRecord] = field(default_factory=dict)  # of all rows, by path
    shards: list[ShardRecord] = field(default_factory=list)
    """The shards of a complete store; of another, see ``complete_shards``."""

    @property
    def context_size(self) -> int:
        """Tokens per context."""
        return self.packing["context_size"]

    @property
    def num_rows(self) -> int:
        """Rows at each site, in the shards listed here."""
        return sum(shard.rows for shard in self.shards)

    @property
    def num_shards(self) -> int:
        """Shards in all, when the store is complete."""
        return -(-self.num_contexts // self.contexts_per_shard)

    def shard_contexts(self, index: int) -> int:
        """Number of contexts in the shard of that index; 0 or less after the last."""
        return min(self.contexts_per_shard, self.num_contexts - index * self.contexts_per_shard)

    def all_files(self) -> dict[str, FileRecord]:
        """Every file of the store, by path within it."""
        files = dict(self.statistics)
        for shard in self.shards:
            files |= shard.files
        return files

    def request(self) -> dict[str, Any]:
        """What cannot change while a store grows: a harvest that resumes it asks for the same."""
        return {key: value for key, value in vars(self).items() if key not in _GROWING}

    def save(self, folder: Path) -> None:
        """Write ``manifest.json``, the store's record."""
        shards = [{**asdict(shard), "files": list(shard.files)} for shard in self.shards]
        facts = {"num_contexts": self.num_contexts, "shards": shards}
        record = Record(self.request(), self.complete, self.all_files(), facts)
        store_in(folder).write(record)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read a store's manifest. Raises as ``Artifact.read`` does."""
        record = store_in(folder).read()
        files = record.files
        shards = [
            ShardRecord(**value | {"files": {path: files.pop(path) for path in value["files"]}})
            for value in record.facts["shards"]
        ]
        contexts = record.facts["num_contexts"]
        return cls(**record.request, num_contexts=contexts, complete=record.complete,
                   statistics=files, shards=shards)  # fmt: skip


def store_in(folder: Path) -> Artifact:
    """The activation store in a folder."""
    return Artifact(folder, MANIFEST, "activation store")


def save_record(folder: Path, index: int, record: ShardRecord) -> None:
    """Record that a shard of a store is complete."""
    write_json(folder / RECORDS / f"{index:05d}.json", asdict(record))


def complete_shards(folder: Path, manifest: Manifest) -> dict[int, ShardRecord]:
    """The complete shards of a store by index: those in its manifest or, until it is complete,
    those with a record. Raises LlmWsaeError if one is damaged."""
    if manifest.complete:
        return dict(enumerate(manifest.shards))
    found = {}
    paths = {int(p.stem): p for p in (folder / RECORDS).glob("*.json") if p.stem.isdecimal()}
    for index, path in sorted(paths.items()):  # names get longer after 99999
        value = read_own_json(path, "record of a shard", "delete it to rebuild the shard")
        found[index] = ShardRecord(**value | {"files": files_of(value["files"])})
    return found


def shard_paths(index: int, site: str) -> tuple[str, str]:
    """Paths within the store of a shard's activations of a site, and of their statistics."""
    return f"{site}/{index:05d}.safetensors", f"{site}/{index:05d}.{STATISTICS}"


def tokens_path(index: int) -> str:
    """Path within the store of a shard's token ids and keep-mask."""
    return f"{TOKENS}/{index:05d}.safetensors"


def read_statistics(path: Path, record: FileRecord) -> Statistics:
    """The statistics in a file of a store. Raises LlmWsaeError if it is not what was written."""
    record.check(path, REPAIR)
    return Statistics.from_tensors(load_tensors(path, "file of statistics")[0])


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
        self.folder: Path = folder  # of the first store
        self._alone = [(folder, manifest), *((one.folder, one.manifest) for one in others)]
        self.manifest: Manifest = _joined([one for _, one in self._alone])
        self.sites = [Site.parse(name) for name in manifest.sites]
        self.d_in = manifest.d_in
        self.num_blocks = integer(manifest.model.get("num_blocks")) or 0
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
        made_with = (("weights_sha256", "weights"), ("dtype", "dtype"), ("planted", "plants"))
        for key, what in made_with:
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
            RowFile(shard.folder / path, one.rows, one.files[path].bytes, one.row_checks[path])
            for shard in self._shards
            for one, path in [(shard.record, shard_paths(shard.number, name)[0])]
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
