"""The manifest of an activation store: what the rows are, and which shards are complete.

During a harvest the manifest says what is being made, and each complete shard has a small record
file of its own, so that several processes can finish shards in any order; a shard without a record
does not exist. At the end the records are moved into the manifest. It holds nothing that differs
between two runs over the same data (no times, no machine's paths), so that a run that was killed
and resumed ends with the same bytes as an uninterrupted one.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llm_wsae.errors import LlmWsaeError
from llm_wsae.files import read_json, write_json

MANIFEST = "manifest.json"
FORMAT = "llm-wsae activation store"
FORMAT_VERSION = 1
TOKENS = "tokens"
RECORDS = "shards"
STATISTICS = "statistics.safetensors"


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum that a file must have."""

    bytes: int
    """Size in bytes."""
    sha256: str
    """SHA-256 in hex."""


@dataclass(frozen=True)
class ShardRecord:
    """One complete shard."""

    contexts: int
    """Number of contexts."""
    rows: int
    """Number of rows at each site."""
    first: tuple[int, int]
    """Document and offset at which its first context begins."""
    next: tuple[int, int]
    """Document and offset at which the next shard begins."""
    files: dict[str, FileRecord]
    """Its files, by path within the store."""


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
        done = index * self.contexts_per_shard
        return min(self.contexts_per_shard, self.num_contexts - done)

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
        write_json(folder / MANIFEST, {**value, "sha256": _digest(value)})

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
        value = read_json(path, "manifest of the activation store")
        if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
            raise LlmWsaeError(f"{path} is not the manifest of an activation store")
        version = value.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise LlmWsaeError(
                f"{folder} has store format {version}; this version of llm-wsae reads format "
                f"{FORMAT_VERSION} only"
            )
        checksum = value.pop("sha256", None)
        if checksum != _digest({"format": FORMAT, "format_version": FORMAT_VERSION, **value}):
            raise LlmWsaeError(f"{path} is damaged: its checksum does not match; harvest again")
        value["statistics"] = _records(value["statistics"])
        value["shards"] = [_shard_record(shard) for shard in value["shards"]]
        return cls(**value)


def save_record(folder: Path, index: int, record: ShardRecord) -> None:
    """Record that a shard of a store is complete, with a checksum over the record itself."""
    value = asdict(record)
    write_json(folder / RECORDS / f"{index:05d}.json", {**value, "sha256": _digest(value)})


def complete_shards(folder: Path, manifest: Manifest) -> dict[int, ShardRecord]:
    """The complete shards of a store by index: those in its manifest and, while the store is not
    complete, those that have a record.

    Raises LlmWsaeError if a record is damaged.
    """
    found = dict(enumerate(manifest.shards))
    if manifest.complete:
        return found
    paths = (folder / RECORDS).glob("[0-9]*.json")
    for path in sorted(paths, key=lambda path: int(path.stem)):  # names get longer after 99999
        value = read_json(path, "record of a shard")
        checksum = value.pop("sha256", None) if isinstance(value, dict) else None
        if checksum is None or checksum != _digest(value):
            raise LlmWsaeError(
                f"{path} is damaged: its checksum does not match; delete it to rebuild the shard"
            )
        found[int(path.stem)] = _shard_record(value)
    return found


def shard_paths(index: int, sites: list[str]) -> dict[str, tuple[str, str]]:
    """By site, the paths within the store of a shard's activations and their statistics."""
    return {
        site: (f"{site}/{index:05d}.safetensors", f"{site}/{index:05d}.{STATISTICS}")
        for site in sites
    }


def tokens_path(index: int) -> str:
    """Path within the store of a shard's token ids and keep-mask."""
    return f"{TOKENS}/{index:05d}.safetensors"


def _shard_record(value: dict[str, Any]) -> ShardRecord:
    first, following, files = tuple(value["first"]), tuple(value["next"]), value["files"]
    return ShardRecord(value["contexts"], value["rows"], first, following, _records(files))


def _records(files: dict[str, Any]) -> dict[str, FileRecord]:
    return {name: FileRecord(**record) for name, record in files.items()}


def _shown(value: Any) -> str:
    """A value as shown in a sentence; a checksum shortened."""
    is_digest = isinstance(value, str) and re.fullmatch("[0-9a-f]{40,}", value)
    return f"'{value[:8]}…'" if is_digest else repr(value)


def _digest(value: dict[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
