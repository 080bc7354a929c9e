"""Reading a .gguf file through transformers in less time and memory.

For a small model most of the time goes into slow Python over every word of the vocabulary.
transformers parses the file three times and builds the same list of names for every module; gguf
cuts every word out of a mapped file, whose parts are slower to make than those of an array. Of an
embedding of 262,144 words there would be three copies in float32 at once. Here the file is parsed
once, its tensor names are listed once, and large tensors are dequantised piece by piece.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_ROWS_AT_ONCE = 16_384  # of a tensor that is dequantised


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
        (gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
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
