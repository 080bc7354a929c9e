"""Digests, by which a file shows that it still holds what was written.

A JSON object and a header of tensors end with their own digest, and so does each line of a file
that grows; other files are listed, with theirs, in the record of their folder. A digest finds
damage: a flipped bit, a torn write, an edit. It is no signature: whoever changes a file on purpose
can compute its digest too.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

KEY = "sha256"
HEADER = "llm_wsae"
"""Key of the JSON object in the metadata of this package's safetensors files."""
_DIGITS = 64
_BLANK = "0" * _DIGITS
_ENDS_WITH_DIGEST = re.compile(r'[0-9a-f]{8}"\}\Z')
_BLOCK = 4 << 20  # bytes with a CRC-32 of their own
_LONGEST_HEADER = 100 << 20  # of a safetensors file, by its specification


class Damaged(ValueError):
    """The digest is not that of the content."""

    def __init__(self) -> None:
        super().__init__("its checksum does not match")


# --- JSON


def json_text(value: Any, key: str | None = KEY) -> str:
    """JSON as this package writes it, indented, keys in the order given; an object ends with the
    digest of its other entries, under ``key`` if that is not None."""
    text = _dumps(value)
    if key is None or not isinstance(value, dict):
        return text
    assert key not in value
    return _dumps({**value, key: _of_value(json.loads(text))})  # as it will be read


def check_json(text: str, key: str = KEY) -> Any:
    """The object that ``json_text`` wrote, without its digest.

    Raises Damaged if the text, to the last space, is not what was written; ValueError if it is not
    JSON.
    """
    return _checked(text, key, _dumps)


def json_line(value: Mapping[str, Any]) -> str:
    """An object as one line of JSON that ends with the digest of its other entries."""
    assert KEY not in value
    return _dumps_line({**value, KEY: _of_value(json.loads(_dumps_line(value)))})


def check_line(text: str) -> Any:
    """``check_json`` for what ``json_line`` gave, with its line's end or without."""
    return _checked(text.removesuffix("\n") + "\n", KEY, _dumps_line)


def _checked(text: str, key: str, dumps: Callable[[Any], str]) -> Any:
    value = json.loads(text)
    digest = value.pop(key, None) if isinstance(value, dict) else None
    if digest != _of_value(value) or dumps({**value, key: digest}) != text:
        raise Damaged
    return value


def _of_value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _dumps(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _dumps_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


# --- Files of tensors


def blank_header(facts: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file with these facts (JSON) and room for its digest."""
    assert KEY not in facts
    return {HEADER: json.dumps({**facts, KEY: _BLANK})}


def fill_header(path: Path) -> None:
    """Write a file's digest into its header, which ``blank_header`` made.

    It is the SHA-256 of the CRC-32s (big-endian) of the file's consecutive blocks of 4 MiB, its own
    digits counted as zeros. Training waits while a checkpoint is written: hence a cheap checksum on
    all cores, while the disk syncs. The digest itself, written last, is not synced here.
    """
    at = _place_of(path, _BLANK)
    with open(path, "r+b") as file, ThreadPoolExecutor(1) as pool:
        synced = pool.submit(os.fsync, file.fileno())
        digest = _of_blocks(path, at)
        synced.result()
        file.seek(at)
        file.write(digest.encode())


def check_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The facts in a safetensors file's metadata; None for another tool's file, without any.

    Raises Damaged if the file is not, to the last byte, what was written.
    """
    if HEADER not in metadata:
        if any(map(_ENDS_WITH_DIGEST.search, metadata.values())):  # its name was damaged
            raise Damaged
        return None
    facts = json.loads(metadata[HEADER])
    digest = facts.pop(KEY, None) if isinstance(facts, dict) else None
    if not isinstance(digest, str) or digest != _of_blocks(path, _place_of(path, digest)):
        raise Damaged
    return facts


def _place_of(path: Path, digest: str) -> int:
    """Where in a file the digits of its digest are: a JSON string within the JSON header."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _LONGEST_HEADER))
    entry = json.dumps(json.dumps({KEY: digest})[1:-1])[1:-1].encode()
    at = header.rfind(entry)
    if at < 0:
        raise Damaged
    return 8 + at + entry.index(digest.encode())


def _of_blocks(path: Path, blank: int) -> str:
    """The digest of a file's blocks, the digits from ``blank`` on counted as zeros."""

    def of_block(start: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(_BLOCK)
        first, stop = max(blank - start, 0), min(blank + _DIGITS - start, len(data))
        if first < stop:
            data = data[:first] + _BLANK.encode()[: stop - first] + data[stop:]
        return zlib.crc32(data).to_bytes(4)

    starts = range(0, path.stat().st_size, _BLOCK)
    if len(starts) == 1:
        return hashlib.sha256(of_block(0)).hexdigest()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(of_block, starts))).hexdigest()


# --- Rows


def crc32s(data: memoryview, size: int) -> list[int]:
    """The CRC-32 of each ``size`` bytes; the last piece may be shorter.

    It finds every change within 32 bits, and all but one in 4·10⁹ of other changes, at a quarter of
    the cost of SHA-256.
    """
    return [zlib.crc32(data[start : start + size]) for start in range(0, len(data), size)]
