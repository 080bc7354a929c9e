"""A safetensors file that several processes write at once, each the rows that it holds.

The format is a header with every tensor's place, then their bytes. Rows of a tensor are contiguous,
so each process writes its own rows in place, and the file equals one written by a single process
with all rows. Nothing is gathered: no process holds more than its part.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_wsae.digests import blank_header, fill_header
from llm_wsae.files import write_atomic, write_error
from llm_wsae.processes import Processes

DTYPES = {torch.float64: "F64", torch.int64: "I64", torch.float32: "F32"}
_ALIGNED = 8  # bytes of the largest of them


class Rows(NamedTuple):
    """Some consecutive rows of a tensor."""

    tensor: Tensor
    first: int
    """Number of the first one."""
    total: int
    """Number of rows over all processes."""


def save_rows(
    path: Path, parts: dict[str, Rows | Tensor], facts: Mapping[str, Any], processes: Processes
) -> None:
    """Write the file atomically, as ``save_own_tensors`` does; rank 0 writes tensors that are not
    ``Rows``, and its ``facts`` count.

    All processes must call this with the same names. Raises LlmWsaeError, in all of them, if one
    cannot write.
    """
    header, places = _layout(parts, blank_header(facts))

    def write(partial: Path) -> None:
        if processes.leads:
            partial.write_bytes(header)
        common = Path(processes.lead(lambda: str(partial)))
        begin = processes.lead(lambda: len(header))  # of rank 0
        _write(common, parts, places, begin, processes.leads)
        processes.meet()
        if processes.leads:
            fill_header(partial)

    if processes.leads:
        write_atomic(path, write)
        return
    try:
        write(path)
    except OSError as error:
        raise write_error(path, error) or error from error


def _layout(
    parts: dict[str, Rows | Tensor], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header, and where each tensor begins after it."""
    entries, starts, at = {}, {}, 0
    tensors = {name: p.tensor if isinstance(p, Rows) else p for name, p in parts.items()}
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        part, tensor = parts[name], tensors[name]
        shape = list(tensor.shape)
        if isinstance(part, Rows):
            shape[0] = part.total
        end = at + math.prod(shape) * tensor.itemsize
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [at, end]}
        starts[name], at = at, end
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    header = len(text).to_bytes(8, "little") + text
    return header, starts


def _write(
    path: Path, parts: dict[str, Rows | Tensor], places: dict[str, int], begin: int, leads: bool
) -> None:
    with open(path, "r+b") as file:
        for name, part in parts.items():
            if not isinstance(part, Rows):
                if not leads:
                    continue
                part = Rows(part, 0, 1)
            ready = part.tensor.detach().cpu().contiguous()
            row_bytes = ready[0].nbytes if part.first else 0
            file.seek(begin + places[name] + part.first * row_bytes)
            file.write(ready.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
