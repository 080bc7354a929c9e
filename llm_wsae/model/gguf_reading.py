"""Reading a .gguf file through transformers in less time and memory.

For a small model most of the time goes into slow Python over every word of the vocabulary.
transformers parses the file three times and builds the same list of names for every module; gguf
cuts every word out of a mapped file, whose parts are slower to make than those of an array. Of an
embedding of 262,144 words there would be three copies in float32 at once. Here the file is parsed
once, its tensor names are listed once, and large tensors are dequantised piece by piece.

The package gguf believes a header: it reads empty parts behind the end of a file, and zeros there,
which take no disk, are as many entries as the header says. So every part that it reads is checked.
"""

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_ROWS_AT_ONCE = 16_384  # of a tensor that is dequantised
_MOST_PARTS = 5_000_000  # of a header; a vocabulary of 262,144 words with its merges has 3,400,000

_LIST = 9  # the type of a value


@contextlib.contextmanager
def gguf_read_once() -> Iterator[None]:
    """While open, transformers reads .gguf files so; nothing happens without the package gguf."""
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf
    from gguf import gguf_reader
    from transformers import modeling_gguf_pytorch_utils as reading

    patched: list[tuple[Any, str, Any]] = [
        (gguf, "GGUFReader", functools.cache(_checked(gguf.GGUFReader))),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        (gguf, "dequantize", functools.partial(_dequantize_in_pieces, gguf.dequantize)),
        (reading, "np", _Numpy()),
        (gguf_reader, "np", _Numpy()),
    ]
    before = [getattr(owner, name) for owner, name, _ in patched]
    try:
        for owner, name, value in patched:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(patched, before, strict=True):
            setattr(owner, name, value)


def _checked(reader: type) -> type:
    """gguf's reader, which raises ValueError for what is not in the file."""

    class Checked(reader):  # type: ignore[misc]
        parts = 0

        def _get(self, offset: Any, dtype: Any, count: Any = 1, *order: Any, **named: Any) -> Any:
            self._count(1)
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends before what its header announces; download it again")
            return super()._get(offset, dtype, count, *order, **named)

        def _get_field_parts(self, offset: Any, kind: Any) -> Any:
            if kind == _LIST:
                self._count(int(self._get(offset + 4, np.uint64)[0]))
            return super()._get_field_parts(offset, kind)

        def _count(self, parts: int) -> None:
            self.parts += parts
            if self.parts > _MOST_PARTS:
                raise ValueError("its header has too many entries")

    return Checked


def gguf_sizes(path: Path) -> tuple[int, int]:
    """How many tensors a GGUF file has, and how many numbers they hold; to be asked while
    ``gguf_read_once`` is open.

    Raises ValueError for a header that announces what the file does not have, and whatever else
    comes of reading a damaged one.
    """
    from gguf import GGUFReader

    tensors = GGUFReader(str(path)).tensors
    if sum(int(tensor.n_bytes) for tensor in tensors) > path.stat().st_size:
        raise ValueError("its tensors do not fit into it; download it again")
    return len(tensors), sum(math.prod(tensor.shape.tolist()) for tensor in tensors)


def _dequantize_in_pieces(
    dequantize: Callable[[np.ndarray, Any], np.ndarray], data: np.ndarray, quantization: Any
) -> np.ndarray:
    """The values of a tensor of a .gguf file, with no more memory than they take."""
    if data.ndim != 2 or len(data) <= _ROWS_AT_ONCE:
        return dequantize(data, quantization)
    first = dequantize(data[:_ROWS_AT_ONCE], quantization)
    values = np.empty((len(data), first.shape[1]), dtype=first.dtype)
    values[:_ROWS_AT_ONCE] = first
    for start in range(_ROWS_AT_ONCE, len(data), _ROWS_AT_ONCE):
        piece = slice(start, start + _ROWS_AT_ONCE)
        values[piece] = dequantize(data[piece], quantization)
    return values


class _Numpy:
    """numpy for the readers of .gguf files."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def memmap(*args: Any, **options: Any) -> np.ndarray:
        """As an array, whose parts take a third of the time to make."""
        return np.memmap(*args, **options).view(np.ndarray)

    @staticmethod
    def copy(values: np.ndarray) -> np.ndarray:
        """What has just been dequantised belongs to nobody else and need not be copied."""
        own = values.flags.owndata and values.flags.writeable
        return values if own else np.array(values)
