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
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

KEY = "sha256"
HEADER = "llm_wsae"
"""Key of the JSON object in the metadata of this package's safetensors files."""
_ENDS_WITH_DIGEST = re.compile(r'[0-9a-f]{8}"\}\Z')
_BLOCK = 4 << 20  # bytes with a CRC-32 of their own


class Damaged(ValueError):
    """The digest is not that of the content."""

    def __str__(self) -> str:
        return "its checksum does not match"


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
    """The object that ``json_text`` wrote, without its digest. Raises Damaged if the text, to the
    last space, is not what was written; ValueError if it is not JSON."""
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


def header(facts: Mapping[str, Any], digest: str) -> dict[str, str]:
    """The metadata of a safetensors file with these facts (JSON) and the digest of all of it."""
    assert KEY not in facts
    return {HEADER: json.dumps({**facts, KEY: digest})}


def of_tensors(facts: Mapping[str, Any], tensors: Iterable[tuple[str, Any]]) -> str:
    """The SHA-256 of the facts and of every tensor's name, type, shape and the CRC-32s of its
    consecutive 4 MiB: training waits while a checkpoint is written, hence a cheap checksum on all
    cores. The tensors, by name and on the CPU, are taken one at a time."""
    import torch

    whole = hashlib.sha256(json.dumps(json.loads(json.dumps(facts)), sort_keys=True).encode())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, tensor in tensors:
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            pieces = [data[start : start + _BLOCK] for start in range(0, len(data), _BLOCK)]
            checks = list(pool.map(zlib.crc32, pieces))
            shown = json.dumps([name, str(tensor.dtype), list(tensor.shape), checks])
            whole.update(shown.encode())
    return whole.hexdigest()


def check_header(
    metadata: Mapping[str, str], tensors: Iterable[tuple[str, Any]]
) -> dict[str, Any] | None:
    """The facts in a safetensors file's metadata; None for another tool's file, without any. Raises
    Damaged if the file is not what was written."""
    if HEADER not in metadata:
        if any(map(_ENDS_WITH_DIGEST.search, metadata.values())):  # its name was damaged
            raise Damaged
        return None
    facts = json.loads(metadata[HEADER])
    digest = facts.pop(KEY, None) if isinstance(facts, dict) else None
    if digest is None or digest != of_tensors(facts, tensors):
        raise Damaged
    return facts
