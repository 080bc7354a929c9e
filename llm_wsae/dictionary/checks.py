"""A dictionary's tensors, refused in a sentence where a name, shape, dtype or value is wrong."""

from pathlib import Path

import torch
from torch import Tensor

from llm_wsae.artifact.files import open_tensors
from llm_wsae.errors import LlmWsaeError

_PIECE = 1 << 20  # numbers checked at once


def read_tensors(
    path: Path,
    what: str,
    shapes: dict[str, tuple[int, ...]] | None,
    dtypes: set[str] | None,
    d_in: int | None = None,
) -> dict[str, Tensor]:
    """All tensors of a file, after a check of its header (safetensors checks the file's length).

    The names and shapes must be those of ``shapes``, the dtypes among ``dtypes``, and with ``d_in``
    every shape [d_in] or [d_in, d_in]; None means no check. Raises LlmWsaeError, naming file and
    tensor, if they are not, or if a number is NaN or infinite.
    """
    with open_tensors(path, what) as file:
        names = set(file.keys())
        if shapes is not None and names != set(shapes):
            raise LlmWsaeError(f"{path} holds {sorted(names)} instead of {sorted(shapes)}")
        for name in sorted(names):
            piece = file.get_slice(name)
            shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
            if shapes is not None and shape != shapes[name]:
                raise LlmWsaeError(
                    f"{path}: {name} has the shape {list(shape)}, but cfg.json asks for "
                    f"{list(shapes[name])}"
                )
            if d_in is not None and shape not in ((d_in,), (d_in, d_in)):
                raise LlmWsaeError(
                    f"{path}: {name} has the shape {list(shape)}, but the dictionary has "
                    f"{d_in} dimensions"
                )
            if dtypes is not None and dtype not in dtypes:
                raise LlmWsaeError(
                    f"{path}: {name} is stored as {dtype}, not as one of {sorted(dtypes)}"
                )
        tensors = {name: file.get_tensor(name) for name in names}
    check_finite(tensors, str(path))
    return tensors


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Raises LlmWsaeError, beginning with ``where``, if a tensor holds NaN or infinite numbers."""
    # Piece by piece: on a whole tensor, torch would allocate a second one.
    for name, tensor in tensors.items():
        pieces = tensor.detach().reshape(-1).split(_PIECE)
        if bad := sum(len(piece) - int(torch.isfinite(piece).sum()) for piece in pieces):
            raise LlmWsaeError(f"{where}: {name} holds {bad} NaN or infinite numbers")
