"""Tensors of a file, before they are believed: whatever its checksum says, each is there, of the
right kind, and finite."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from llm_wsae.errors import LlmWsaeError


def tensor_of(
    tensors: Mapping[str, Tensor], name: str, *shape: int | None, counts: bool = False
) -> Tensor:
    """The tensor of that name and shape (None: any length), of floating-point numbers or counts.

    Raises LlmWsaeError, naming it, unless it is that; infinite numbers are allowed.
    """
    if name not in tensors:
        raise LlmWsaeError(f"they lack the tensor {name!r}")
    found = tensors[name]
    fits = found.ndim == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, found.shape, strict=True)
    )
    is_right = found.dtype == torch.int64 if counts else found.is_floating_point()
    if not (fits and is_right):
        kind = str(found.dtype).removeprefix("torch.")
        raise LlmWsaeError(f"their tensor {name!r} is {kind} of shape {list(found.shape)}")
    if counts and bool((found < 0).any()):
        raise LlmWsaeError(f"their tensor {name!r} has a negative count")
    return found


def finite_tensor_of(tensors: Mapping[str, Tensor], name: str, *shape: int | None) -> Tensor:
    """The same of floating-point numbers, all finite."""
    found = tensor_of(tensors, name, *shape)
    if not bool(found.isfinite().all()):
        raise LlmWsaeError(f"their tensor {name!r} holds NaN or infinite numbers")
    return found


@contextmanager
def reading(path: Path, what: str, way_out: str) -> Iterator[None]:
    """Name the file and the way out in an error about its content."""
    try:
        yield
    except LlmWsaeError as error:
        raise LlmWsaeError(f"{path} cannot be the {what}: {error}; {way_out}") from error
