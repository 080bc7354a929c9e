"""Gemma Scope: ``params.npz`` with W_enc, W_dec, b_enc, b_dec and threshold (Lieberum et al. 2024).

JumpReLU without centring, so nothing is folded. There is no configuration: the arrays give the
sizes, the path gives model and site (``gemma-scope-2b-pt-res/layer_20/width_16k/…``). The archive's
headers are read first. Arrays of Python objects, which would be pickles, are refused, as is every
other dtype that is not floating point, and an archive that would expand to far more than its size.
"""

import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch

from llm_wsae.dictionary.checks import check_finite
from llm_wsae.dictionary.formats.layout import Announced, Layout, Weights, not_negative
from llm_wsae.errors import LlmWsaeError

WEIGHTS = "params.npz"
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_LARGEST_HEADER = 10_000  # bytes of an array's description
_ENCRYPTED = 0x1  # flag of an archive entry
_HEADER = re.compile(
    r"\{'descr': '([^']+)', 'fortran_order': (True|False), 'shape': \(((?:\d+, ?)*\d*)\), \} *\n",
    re.ASCII,
)
_FLOAT = re.compile(r"[<>=|]f[248]")  # "|O" would be pickled objects
_MOST_EXPANSION = 20  # times the compressed size: weights are noise and hardly compress
_RELEASE = re.compile(r".*gemma-scope-(\d+b-(?:pt|it))-(\w+)")
_LAYER = re.compile(r"layer_(\d+)", re.ASCII)
_WIDTH = re.compile(r"width_([1-9]\d{0,3})(k|m)", re.ASCII)
_POINTS = {"res": "hook_resid_post", "att": "attn.hook_z"}  # by release; the others are MLPs
_KIBI = {"k": 1 << 10, "m": 1 << 20}


class _Array(NamedTuple):
    """One array of the archive, as its header describes it."""

    entry: zipfile.ZipInfo
    shape: tuple[int, ...]
    fortran: bool
    dtype: str
    """In numpy's notation: ``<f4``."""


def announce(config: Mapping[str, Any], place: PurePath) -> Announced:
    """What the path says: model, site and width."""
    release = next((m for part in place.parts if (m := _RELEASE.fullmatch(part))), None)
    layer = next((m for part in place.parts if (m := _LAYER.fullmatch(part))), None)
    width = next((m for part in place.parts if (m := _WIDTH.fullmatch(part))), None)
    site = None
    if release and layer:
        site = f"blocks.{layer[1]}.{_POINTS.get(release[2], 'hook_mlp_out')}"
    return Announced(
        architecture="jumprelu",
        d_sae=_power_of_two(int(width[1]) * _KIBI[width[2]]) if width else None,
        site=site,
        model=f"google/gemma-2-{release[1].removesuffix('-pt')}" if release else None,
        context_size=1024,
        prepend_bos=True,
    )


def read(folder: Path, config: Mapping[str, Any], announced: Announced) -> Weights:
    """The tensors, unchanged. Raises LlmWsaeError, naming file and fault."""
    path = folder / WEIGHTS
    if "embedding" in folder.absolute().parts:
        raise LlmWsaeError(
            f"{path} explains token embeddings, which are not a site of the residual stream"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = _checked(path, _headers(path, archive))
            tensors = {name: _tensor(path, archive, array) for name, array in arrays.items()}
    except (
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,  # a compression that Python does not know
        EOFError,
        OSError,
        ValueError,
    ) as error:
        raise LlmWsaeError(f"{path} is not a complete archive of arrays: {error}") from error
    check_finite(tensors, str(path))
    tensors["threshold"] = not_negative(tensors["threshold"])
    return Weights(tensors, announced.sparsity(path, "jumprelu", tensors["b_enc"].shape[0]))


def _power_of_two(size: int) -> int:
    """The width that a short name stands for: 65k is 65,536 = 2¹⁶, less than 65 · 1024."""
    return 1 << (size.bit_length() - 1)


def _headers(path: Path, archive: zipfile.ZipFile) -> dict[str, _Array]:
    found: dict[str, _Array] = {}
    names = sorted(entry.filename for entry in archive.infolist())
    if names != sorted(f"{name}.npy" for name in _NAMES):
        raise LlmWsaeError(f"{path} holds {names} instead of the arrays {sorted(_NAMES)}")
    for entry in archive.infolist():
        name = entry.filename.removesuffix(".npy")
        if entry.flag_bits & _ENCRYPTED:
            raise LlmWsaeError(f"{path} is encrypted")
        with _open(archive, entry) as member:
            shape, fortran, dtype = _header(member)
            start = member.tell()
        if not _FLOAT.fullmatch(dtype):
            raise LlmWsaeError(f"{path}: {name} is stored as {dtype!r}, not as floating point")
        if entry.file_size != start + math.prod(shape) * int(dtype[2:]):
            raise LlmWsaeError(f"{path}: {name} has not the length of its shape {list(shape)}")
        if entry.file_size > _MOST_EXPANSION * min(entry.compress_size, path.stat().st_size):
            raise LlmWsaeError(
                f"{path}: {name} would expand to far more than its size, so it is not read"
            )
        found[name] = _Array(entry, shape, fortran, dtype)
    return found


def _open(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> zipfile.ZipExtFile:
    member = archive.open(entry)
    assert isinstance(member, zipfile.ZipExtFile)  # which is no IO[bytes], whatever typeshed says
    return member


def _header(member: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, str]:
    """Shape, order and dtype of an array, as numpy writes them. Raises ValueError otherwise."""
    start = member.read(8)
    if start[:6] != b"\x93NUMPY" or start[6:] not in (b"\1\0", b"\2\0"):
        raise ValueError("a member is not an array in numpy's format")
    length = int.from_bytes(member.read(2 if start[6] == 1 else 4), "little")
    words = member.read(min(length, _LARGEST_HEADER)).decode("latin-1")
    match = _HEADER.fullmatch(words)
    if match is None:
        raise ValueError("the description of an array cannot be read")
    shape = tuple(int(size) for size in match[3].split(",") if size.strip())
    return shape, match[2] == "True", match[1]


def _checked(path: Path, arrays: dict[str, _Array]) -> dict[str, _Array]:
    """The arrays, after checking that their shapes fit each other."""
    sizes = arrays["W_enc"].shape
    if len(sizes) != 2 or 0 in sizes:
        raise LlmWsaeError(f"{path}: W_enc has the shape {list(sizes)}, which is not a matrix")
    d_in, d_sae = sizes
    shapes = {"W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,), "threshold": (d_sae,)}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise LlmWsaeError(
                f"{path}: {name} has the shape {list(arrays[name].shape)}, but W_enc asks for "
                f"{list(shape)}"
            )
    return arrays


def _tensor(path: Path, archive: zipfile.ZipFile, array: _Array) -> torch.Tensor:
    with _open(archive, array.entry) as member:
        _header(member)
        data = bytearray(math.prod(array.shape) * int(array.dtype[2:]))
        filled = 0
        while filled < len(data) and (got := member.readinto(memoryview(data)[filled:])):
            filled += got
        if filled < len(data) or member.read(1):  # the last read also checks the checksum
            raise LlmWsaeError(f"{path} is truncated")
    values = np.frombuffer(data, array.dtype).reshape(
        array.shape, order="F" if array.fortran else "C"
    )
    return torch.from_numpy(values.astype(np.float32, copy=False))


LAYOUT = Layout("Gemma Scope", None, WEIGHTS, announce, read)
