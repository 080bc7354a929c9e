"""What is recorded of a complete shard: its contexts, its rows, its files, and their checksums.

A record is read back only if it could be a harvest's, whatever its digest says.
"""

import base64
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from llm_wsae.artifact.files import sha256
from llm_wsae.errors import LlmWsaeError, shown

TOKENS = "tokens"
STATISTICS = "statistics.safetensors"
ROWS_PER_CHECK = 128
"""Rows of a shard that share a CRC-32; the last of a shard may be fewer."""
REPAIR = "delete it, if it is there, and run the same harvest again, which rewrites what is missing"
_CRC = np.dtype("<u4")
_LARGEST = 2**53  # count of anything


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum that a file must have."""

    bytes: int
    """Size in bytes."""
    sha256: str
    """SHA-256 in hex."""

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """The record of a file as it is."""
        return cls(path.stat().st_size, sha256(path))

    def has_size(self, path: Path) -> bool:
        """Whether there is a file of that size; what it holds is not compared."""
        return path.is_file() and path.stat().st_size == self.bytes

    def problem(self, path: Path) -> str | None:
        """What is wrong with the file at that path, in a sentence; None if nothing is."""
        try:
            size = path.stat().st_size
            if size != self.bytes:
                return f"{path} is truncated or extended: {size} bytes instead of {self.bytes}"
            changed = sha256(path) != self.sha256
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        return f"{path} is damaged: its checksum does not match" if changed else None

    def check(self, path: Path) -> None:
        """Raise LlmWsaeError unless the file at that path holds what was written."""
        if problem := self.problem(path):
            raise LlmWsaeError(f"{problem}; {REPAIR}")


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
    row_checks: dict[str, str]
    """CRC-32 of each ``ROWS_PER_CHECK`` rows of a file of activations, by its path: 32-bit numbers,
    little-endian, in base64."""

    def crc32s(self, path: str) -> np.ndarray:
        """The CRC-32s of a file of activations."""
        return np.frombuffer(base64.b64decode(self.row_checks[path]), dtype=_CRC)


def packed(crc32s: list[int]) -> str:
    """CRC-32s as a record has them."""
    return base64.b64encode(np.array(crc32s, dtype=_CRC).tobytes()).decode()


def shard_paths(index: int, sites: list[str]) -> dict[str, tuple[str, str]]:
    """By site, the paths within the store of a shard's activations and their statistics."""
    return {
        site: (f"{site}/{index:05d}.safetensors", f"{site}/{index:05d}.{STATISTICS}")
        for site in sites
    }


def tokens_path(index: int) -> str:
    """Path within the store of a shard's token ids and keep-mask."""
    return f"{TOKENS}/{index:05d}.safetensors"


def all_paths(index: int, sites: list[str]) -> list[str]:
    """Paths within the store of all files of a shard, always in the same order."""
    pairs = shard_paths(index, sites).values()
    return [tokens_path(index), *(path for pair in pairs for path in pair)]


# --- From JSON


class Odd(Exception):
    """A value that no harvest writes."""


def want(fits: bool, name: str, value: Any) -> None:
    """Raise Odd, naming the value, unless it fits."""
    if not fits:
        raise Odd(f"its {name} is {shown(value)}")


def is_count(value: Any, least: int = 0) -> bool:
    """Whether it is a whole number, at least that, of something that can be counted."""
    return type(value) is int and least <= value < _LARGEST


def is_digest(value: Any) -> bool:
    """Whether it is a SHA-256 in hex."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def want_object(value: Any, known: set[str], name: str) -> None:
    """Raise Odd unless the value is an object with those keys."""
    want(isinstance(value, dict), name, value)
    for key in sorted(known - value.keys()):
        raise Odd(f"its {name} lacks {shown(key)}")
    for key in sorted(value.keys() - known):
        raise Odd(f"its {name} has an unknown {shown(key)}")


def record_of_shard(
    value: Any, index: int, sites: list[str], most_contexts: int, context_size: int
) -> ShardRecord:
    """The record of a shard with that index. Raises Odd if it cannot be one."""
    what = f"shard {index}'s"
    names = {own.name for own in fields(ShardRecord)}
    want_object(value, names, f"{what} record")
    contexts, rows = value["contexts"], value["rows"]
    want(is_count(contexts, 1) and contexts <= most_contexts, f"{what} contexts", contexts)
    want(is_count(rows) and rows <= contexts * context_size, f"{what} rows", rows)
    for name in ("first", "next"):
        cursor = value[name]
        fits = isinstance(cursor, list) and len(cursor) == 2 and all(map(is_count, cursor))
        want(fits, f"{what} {name}", cursor)
    pairs = shard_paths(index, sites).values()
    checks = value["row_checks"]
    want_object(checks, {path for path, _ in pairs}, f"{what} row_checks")
    for given in checks.values():
        length = _CRC.itemsize * -(-rows // ROWS_PER_CHECK)
        want(_decoded_length(given) == length, f"{what} row_checks", given)
    return ShardRecord(
        contexts,
        rows,
        tuple(value["first"]),
        tuple(value["next"]),
        records_of_files(value["files"], set(all_paths(index, sites)), f"{what} files"),
        checks,
    )


def records_of_files(value: Any, paths: set[str], name: str) -> dict[str, FileRecord]:
    """The records of files. Raises Odd unless they are exactly of those paths."""
    want_object(value, paths, name)
    found = {}
    for path, record in value.items():
        want_object(record, {"bytes", "sha256"}, path)
        size, digest = record["bytes"], record["sha256"]
        want(is_count(size), f"{path} bytes", size)
        want(is_digest(digest), f"{path} sha256", digest)
        found[path] = FileRecord(size, digest)
    return found


def _decoded_length(text: Any) -> int:
    try:
        return len(base64.b64decode(text, validate=True))
    except (TypeError, ValueError):
        return -1
