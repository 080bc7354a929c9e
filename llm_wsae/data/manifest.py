"""The manifest of an activation store: what the rows are, and which shards are complete.

During a harvest the manifest says what is being made, and each complete shard has a small record
file of its own, so that several processes can finish shards in any order; a shard without a record
does not exist. At the end the records are moved into the manifest. It holds nothing that differs
between two runs over the same data (no times, no machine's paths), so that a run that was killed
and resumed ends with the same bytes as an uninterrupted one.
"""

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llm_wsae.artifact.files import read_own_json, write_json
from llm_wsae.data.config import PackConfig
from llm_wsae.data.shard_record import (
    STATISTICS,
    FileRecord,
    Odd,
    ShardRecord,
    is_count,
    record_of_shard,
    records_of_files,
    shard_paths,
    want,
    want_object,
)
from llm_wsae.errors import LlmWsaeError, UsageError, shown
from llm_wsae.model.site import Site

MANIFEST = "manifest.json"
FORMAT = "llm-wsae activation store"
FORMAT_VERSION = 1
_UNREAD = "0.1.0"
"""Version of this package whose stores lack what is needed to prove and to order their rows."""
RECORDS = "shards"
BYTES_OF = {"bfloat16": 2, "float32": 4}
"""Number formats of rows, and their bytes."""
_WIDEST = 2**24  # rows, and contexts
_MOST_DOCUMENTS = 2**31  # they are numbered in 32 bits
_LONGEST_HEADER = 1024  # bytes before the rows of a shard; it needs about 100


@dataclass
class Manifest:
    """Everything about a store except its rows; the fields are the keys of ``manifest.json``."""

    package_version: str
    """Version of this package that began the store."""
    model: dict[str, Any]
    """``LanguageModel.identity()``."""
    corpus: dict[str, Any]
    """``Corpus.identity()``."""
    sites: list[str]
    """Sites, in the order of a forward pass."""
    dtype: str
    """Number format of the rows, ``bfloat16`` or ``float32``."""
    d_in: int
    """Width of the rows."""
    packing: dict[str, Any]
    """How documents became contexts and which positions were dropped: ``PackConfig``."""
    bos_token_id: int | None
    """Token at the beginning of each context, None if there is none."""
    contexts_per_batch: int
    """Contexts per forward pass; it can change the last bits of the rows."""
    contexts_per_shard: int
    """Contexts in each shard except the last."""
    num_contexts: int
    """Contexts requested."""
    complete: bool = False
    """Whether all contexts and the statistics of all rows have been written."""
    statistics: dict[str, FileRecord] = field(default_factory=dict)
    """The files with the statistics of all rows of each site, by path within the store."""
    shards: list[ShardRecord] = field(default_factory=list)
    """The shards; of an incomplete store only some, see ``complete_shards``."""

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

    def differences(self, other: "Manifest") -> list[str]:
        """Clauses that say how another harvest differs from this one."""
        clauses = []
        for name in ("model", "corpus", "packing"):
            mine, others = getattr(self, name), getattr(other, name)
            clauses += [
                f"{name} {key} is {_shown(mine.get(key))}, not {_shown(others.get(key))}"
                for key in dict.fromkeys([*mine, *others])
                if mine.get(key) != others.get(key)
            ]
        names = ("sites", "dtype", "d_in", "bos_token_id")
        for name in (*names, "contexts_per_batch", "contexts_per_shard"):
            mine, others = getattr(self, name), getattr(other, name)
            if mine != others:
                clauses.append(
                    f"its {name.replace('_', ' ')} is {_shown(mine)}, not {_shown(others)}"
                )
        return clauses

    def save(self, folder: Path) -> None:
        """Write ``manifest.json`` with a checksum over itself."""
        value = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        write_json(folder / MANIFEST, value)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read a store's manifest.

        Raises LlmWsaeError if there is none, it is damaged, or it is not of this format.
        """
        path = folder / MANIFEST
        if not folder.is_dir():
            raise LlmWsaeError(f"there is no activation store {folder}")
        if not path.is_file():
            raise LlmWsaeError(f"{folder} is not an activation store: it has no {MANIFEST}")
        way_out = "restore it from a copy, or harvest into another folder"
        value = read_own_json(path, "manifest of the activation store", way_out)
        if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
            raise LlmWsaeError(f"{path} is not the manifest of an activation store")
        version = value.pop("format_version", None)
        if version != FORMAT_VERSION or value.get("package_version") == _UNREAD:
            by = value.get("package_version")
            raise LlmWsaeError(
                f"{folder} has store format {shown(version)} of llm-wsae {shown(by)}, which this "
                "version does not read; harvest again, into another folder"
            )
        try:
            return _manifest(value)
        except Odd as odd:
            raise LlmWsaeError(f"{path} cannot be a harvest's: {odd}; {way_out}") from None


def save_record(folder: Path, index: int, record: ShardRecord) -> None:
    """Record that a shard of a store is complete, with a checksum over the record itself."""
    write_json(folder / RECORDS / f"{index:05d}.json", asdict(record))


def complete_shards(folder: Path, manifest: Manifest) -> dict[int, ShardRecord]:
    """The complete shards of a store by index: those in its manifest and, while the store is not
    complete, those that have a record.

    Raises LlmWsaeError if a record is damaged.
    """
    found = dict(enumerate(manifest.shards))
    if manifest.complete:
        return found
    paths = [path for path in (folder / RECORDS).glob("*.json") if path.stem.isdecimal()]
    for path in sorted(paths, key=lambda path: int(path.stem)):  # names get longer after 99999
        way_out = "delete it to rebuild the shard"
        value = read_own_json(path, "record of a shard", way_out)
        try:
            found[int(path.stem)] = _shard_record(manifest, int(path.stem), value)
        except Odd as odd:
            raise LlmWsaeError(f"{path} cannot be a shard's: {odd}; {way_out}") from None
    return found


def _manifest(value: dict[str, Any]) -> Manifest:
    """A manifest from JSON. Raises Odd for a value that no harvest writes."""
    want_object(value, {own.name for own in fields(Manifest)}, "content")
    version, corpus = value["package_version"], value["corpus"]
    want(isinstance(version, str), "package_version", version)
    want(isinstance(corpus, dict), "corpus", corpus)
    want(isinstance(corpus.get("name"), str), "corpus name", corpus.get("name"))
    for name in ("contexts_per_batch", "contexts_per_shard", "num_contexts"):
        want(is_count(value[name], 1), name, value[name])
    want(value["dtype"] in list(BYTES_OF), "dtype", value["dtype"])
    want(isinstance(value["model"], dict), "model", value["model"])
    for name in ("name", "dtype", "weights_sha256"):
        want(isinstance(value["model"].get(name), str), f"model {name}", value["model"].get(name))
    want(is_count(value["d_in"], 1) and value["d_in"] < _WIDEST, "d_in", value["d_in"])
    bos = value["bos_token_id"]
    want(bos is None or is_count(bos), "bos_token_id", bos)
    want(type(value["complete"]) is bool, "complete", value["complete"])
    _check_packing(value["packing"])
    _check_sites(value["sites"])
    want(isinstance(value["shards"], list), "shards", value["shards"])
    manifest = Manifest(**value | {"shards": [], "statistics": {}})
    paths = {f"{site}/{STATISTICS}" for site in manifest.sites} if manifest.complete else set()
    manifest.statistics = records_of_files(value["statistics"], paths, "statistics")
    manifest.shards = [
        _shard_record(manifest, index, record) for index, record in enumerate(value["shards"])
    ]
    if manifest.complete:
        want(len(manifest.shards) == manifest.num_shards, "num_contexts", manifest.num_contexts)
        for index, shard in enumerate(manifest.shards):
            wanted = manifest.shard_contexts(index)
            want(shard.contexts == wanted, f"shard {index}'s contexts", shard.contexts)
        last = manifest.shards[-1].next[0]
        want(last < _MOST_DOCUMENTS, "last document", last)
    return manifest


def _shard_record(manifest: Manifest, index: int, value: Any) -> ShardRecord:
    most, size = manifest.contexts_per_shard, manifest.context_size
    record = record_of_shard(value, index, manifest.sites, most, size)
    for path, _ in shard_paths(index, manifest.sites).values():
        bytes_of_file = record.files[path].bytes
        header = bytes_of_file - record.rows * manifest.d_in * BYTES_OF[manifest.dtype]
        want(0 < header < _LONGEST_HEADER, f"{path} bytes", bytes_of_file)
    return record


def _check_packing(packing: Any) -> None:
    known = PackConfig.__dataclass_fields__
    want_object(packing, set(known), "packing")
    for name, value in packing.items():
        want(type(value) is type(known[name].default), f"packing {name}", value)
    try:
        PackConfig(**packing)
    except UsageError as error:
        raise Odd(str(error)) from None
    want(packing["context_size"] < _WIDEST, "packing context_size", packing["context_size"])


def _check_sites(sites: Any) -> None:
    want(isinstance(sites, list) and len(sites) > 0, "sites", sites)
    for name in sites:
        try:
            fits = isinstance(name, str) and str(Site.parse(name)) == name
        except UsageError:
            fits = False
        want(fits and sites.count(name) == 1, "site", name)


def _shown(value: Any) -> str:
    """A value as shown in a sentence; a checksum shortened."""
    long = isinstance(value, str) and re.fullmatch("[0-9a-f]{40,}", value)
    return f"'{value[:8]}…'" if long else repr(value)
