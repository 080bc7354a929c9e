"""The manifest of an activation store: what the rows are, and which shards are complete.

During a harvest the manifest says what is being made, and each complete shard has a small record
file of its own, so that several processes can finish shards in any order; a shard without a record
does not exist. At the end the records are moved into the manifest. It holds no times and no paths
of a machine, so that a run that was killed and resumed ends with the same bytes.
"""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_wsae.artifact.artifact import Artifact, FileRecord, Record, files_of
from llm_wsae.artifact.files import load_tensors, read_own_json, write_json
from llm_wsae.statistics.moments import Statistics

MANIFEST = "manifest.json"
RECORDS = "shards"
TOKENS = "tokens"
STATISTICS = "statistics.safetensors"
ROWS_PER_CHECK = 128
"""Rows of a shard that share a CRC-32; the last of a shard may be fewer."""
REPAIR = "delete it, if it is there, and run the same harvest again, which rewrites what is missing"
_CRC = np.dtype("<u4")
_GROWING = ("num_contexts", "complete", "statistics", "shards")


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


def row_checks(rows: Tensor) -> str:
    """The CRC-32 of each ``ROWS_PER_CHECK`` contiguous rows: 32-bit numbers, little-endian, in
    base64. It finds all but one in 4·10⁹ changes at a quarter of the cost of SHA-256."""
    data, size = bytes_of(rows), ROWS_PER_CHECK * rows.shape[1] * rows.itemsize
    found = [zlib.crc32(data[start : start + size]) for start in range(0, len(data), size)]
    return base64.b64encode(np.array(found, dtype=_CRC).tobytes()).decode()


def read_row_checks(text: str) -> np.ndarray:
    """The CRC-32s in what ``row_checks`` gave."""
    return np.frombuffer(base64.b64decode(text), dtype=_CRC)


def bytes_of(rows: Tensor) -> memoryview:
    """The memory of contiguous rows."""
    return rows.flatten().view(torch.uint8).numpy().data


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
