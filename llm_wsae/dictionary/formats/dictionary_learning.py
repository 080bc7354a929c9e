"""saprmarks' dictionary_learning: ``config.json`` and ``ae.pt``, which is a pickle.

A pickle can run code, so it is opened only with torch's ``weights_only`` loader, which accepts
nothing but tensors and containers, and the user is told. Before that, the archive around it is
checked. It must be laid out as torch.save does it, so that torch's reader sees what was checked.
Its records must be uncompressed (a compressed one could expand without end), lie apart, be no
larger than ``config.json`` announces, and match the checksums stored with them. The file is mapped,
not read, so a record that claims more than it has cannot cause a read beyond it; its size gives it
away afterwards.

The classes, by ``dict_class``: AutoEncoder subtracts its bias from the input and is used with
decoder columns of unit norm, AutoEncoderNew does neither; AutoEncoderTopK; GatedAutoEncoder;
BatchTopKSAE and MatryoshkaBatchTopKSAE encode with one threshold; JumpReluAutoEncoder has one per
latent and does not subtract its bias.
"""

import math
import os
import re
import struct
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

# Only the exception, which torch's loader raises; nothing here unpickles.
from pickle import UnpicklingError
from typing import IO, Any

import torch
from torch import Tensor

from llm_wsae.dictionary.checks import check_finite
from llm_wsae.dictionary.formats.layout import (
    Announced,
    Layout,
    Weights,
    gated_as_jumprelu,
    not_negative,
    own_copy,
    with_decoder_norms,
    without_input_bias,
)
from llm_wsae.errors import LlmWsaeError, nearest, shown
from llm_wsae.outside import integer, mapping, text
from llm_wsae.terminal import printable

CONFIG, WEIGHTS = "config.json", "ae.pt"
_PIECE = 1 << 20  # bytes read at once
_LARGEST_PICKLE = 1 << 20  # bytes of everything except tensors: names and shapes
_RECORD = re.compile(r"[\w./-]+", re.ASCII)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_POINT = re.compile(r"resid_(pre|mid|post)")
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_ROWS = ("W_enc", "W_dec", "b_enc", "b_dec")
# Each class: SAELens' name for its kind, and the tensors it holds.
_CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "AutoEncoder": ("standard", (*_LINEAR, "bias")),
    "AutoEncoderNew": ("standard", (*_LINEAR, "decoder.bias")),
    "GatedAutoEncoder": (
        "gated",
        ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
    ),
    "AutoEncoderTopK": ("topk", (*_LINEAR, "b_dec")),
    "BatchTopKSAE": ("jumprelu", (*_LINEAR, "b_dec", "threshold")),
    "MatryoshkaBatchTopKSAE": ("jumprelu", (*_ROWS, "threshold")),
    "JumpReluAutoEncoder": ("jumprelu", (*_ROWS, "threshold")),
}
_UNUSED = {"k", "threshold", "group_sizes"}  # may be there but have no part in encoding


def announce(config: Mapping[str, Any], place: PurePath) -> Announced:
    """What ``config.json`` says; ``place`` is not used."""
    trainer, buffer = mapping(config.get("trainer")), mapping(config.get("buffer"))
    kind, _ = _CLASSES.get(text(trainer.get("dict_class")) or "", (None, ()))
    return Announced(
        architecture=kind,
        d_in=integer(trainer.get("activation_dim")),
        d_sae=integer(trainer.get("dict_size")),
        k=integer(trainer.get("k")) if kind == "topk" else None,
        site=_site(trainer),
        model=text(trainer.get("lm_name")),
        context_size=integer(buffer.get("ctx_len")),
    )


def read(folder: Path, config: Mapping[str, Any], announced: Announced) -> Weights:
    """The tensors with centring, norms and gates folded in.

    Raises LlmWsaeError, naming file and fault.
    """
    path = folder / CONFIG
    name = str(mapping(config.get("trainer")).get("dict_class"))
    if name not in _CLASSES:
        raise LlmWsaeError(
            f"{path} has the dict_class {shown(name)}, which this package does not read; "
            f"{nearest(name, _CLASSES)}"
        )
    rows = mapping(config.get("buffer")).get("io", "out")
    if rows not in ("in", "out"):
        raise LlmWsaeError(
            f"{path} describes a transcoder (io = {shown(rows)}), which does not reconstruct its "
            "own input"
        )
    kind, wanted = _CLASSES[name]
    d_in, d_sae = announced.sizes(path)
    sparsity = announced.sparsity(path, "jumprelu" if kind == "gated" else kind, d_sae)
    w = _tensors(folder / WEIGHTS, wanted, d_in, d_sae)
    W_enc = w["W_enc"] if "W_enc" in w else w["encoder.weight"].T
    W_dec = w["W_dec"] if "W_dec" in w else w["decoder.weight"].T
    b_dec = next(w[n] for n in ("b_dec", "bias", "decoder.bias", "decoder_bias") if n in w)
    threshold = w["threshold"].expand(d_sae) if "threshold" in wanted else None
    if kind == "gated":
        W_enc, b_enc, threshold = gated_as_jumprelu(
            W_enc, w["r_mag"], w["gate_bias"], w["mag_bias"]
        )
    else:
        b_enc = w["b_enc"] if "b_enc" in w else w["encoder.bias"]
    if name == "AutoEncoder" and not _unit_rows(W_dec):
        W_enc, b_enc, W_dec, _ = with_decoder_norms(W_enc, b_enc, W_dec)
    if name not in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        b_enc = without_input_bias(W_enc, b_enc, b_dec)
    tensors = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    if threshold is not None:
        tensors["threshold"] = not_negative(threshold)
    return Weights(tensors, sparsity)


def _unit_rows(W_dec: Tensor) -> bool:
    """The other tool's own test, by which it leaves nearly normalised rows as they are."""
    norms = W_dec.norm(dim=1)
    return torch.allclose(norms, torch.ones_like(norms))


def _site(trainer: Mapping[str, Any]) -> str | None:
    """The block and module that they name; a block alone may mean any of its parts."""
    block, module = integer(trainer.get("layer")), text(trainer.get("submodule_name"))
    if block is None or module is None:
        return None
    match = _POINT.match(module)
    return f"blocks.{block}.hook_{match[0]}" if match else module


def _tensors(path: Path, wanted: tuple[str, ...], d_in: int, d_sae: int) -> dict[str, Tensor]:
    """The wanted tensors, float32, finite, of the shapes they must have."""
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d_in),
        "decoder.weight": (d_in, d_sae),
        "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in),
        **dict.fromkeys(("bias", "decoder.bias", "decoder_bias", "b_dec"), (d_in,)),
        "threshold": (d_sae,) if "W_enc" in wanted else (),
    }
    records = _records(path, sum(8 * math.prod(shapes.get(name, (d_sae,))) for name in wanted))
    found = _opened(path, records)
    if missing := sorted(set(wanted) - set(found)):
        raise LlmWsaeError(f"{path} lacks the tensors {', '.join(missing)}")
    if strange := sorted(set(found) - set(wanted) - _UNUSED):
        raise LlmWsaeError(f"{path} holds unexpected tensors {', '.join(map(repr, strange))}")
    for name in wanted:
        tensor, shape = found[name], shapes.get(name, (d_sae,))
        scalar_threshold = name == "threshold" and tensor.ndim == 0
        if tuple(tensor.shape) != shape and not scalar_threshold:
            raise LlmWsaeError(
                f"{path}: {name} has the shape {list(tensor.shape)}, but {CONFIG} asks for "
                f"{list(shape)}"
            )
        if tensor.dtype not in _FLOATS:
            raise LlmWsaeError(f"{path}: {name} is stored as {tensor.dtype}")
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # one stored number expanded to many
            raise LlmWsaeError(f"{path}: {name} is not stored in full")
    tensors = {name: found[name] for name in wanted}
    check_finite(tensors, str(path))
    return {name: own_copy(tensor) for name, tensor in tensors.items()}


def _records(path: Path, largest: int) -> list[int]:
    """Sizes in bytes of the archive's tensor records, after checking all of the archive."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check_directory(file, archive.start_dir, len(entries))
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise LlmWsaeError(
                    f"{path} is compressed, which torch.save never does, so it is not read"
                )
            if sum(entry.file_size for entry in entries) > largest + _LARGEST_PICKLE:
                raise LlmWsaeError(f"{path} is larger than the dictionary that {CONFIG} describes")
            _check_places(file, archive.start_dir, entries)
            for entry in entries:
                _check_record(archive, entry)
    except (
        zipfile.BadZipFile,
        struct.error,
        EOFError,
        OSError,
        ValueError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        raise LlmWsaeError(f"{path} is not a complete file of torch.save: {error}") from error
    return [entry.file_size for entry in entries if "/data/" in entry.filename]


def _check_directory(file: IO[bytes], start: int, entries: int) -> None:
    """The archive must end as torch.save ends one, without anything before, between or behind its
    parts: elsewhere, torch's reader could find another directory than Python's.

    Raises ValueError if it does not.
    """
    file.seek(0)
    begins = file.read(4) == b"PK\3\4"  # or torch would take it for another format
    end = file.seek(-22, os.SEEK_END)
    signature, *disks, here, total, size, offset, comment = struct.unpack("<4s4H2LH", file.read(22))
    plain = signature == b"PK\5\6" and not any(disks) and not comment and here == total
    file.seek(max(0, end - 76))
    longer, locator = file.read(56), file.read(20)
    if locator[:4] == b"PK\6\7":
        end -= 76
        plain &= locator == struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
        plain &= longer[:12] == struct.pack("<4sQ", b"PK\6\6", 44)
        *disks, here, total, size, offset = struct.unpack("<2L4Q", longer[16:])
        plain &= not any(disks) and here == total
    if not (begins and plain and (total, offset, offset + size) == (entries, start, end)):
        raise ValueError("its directory is not where torch.save writes one")


def _check_places(file: IO[bytes], stop: int, entries: Sequence[zipfile.ZipInfo]) -> None:
    """Every record must have a name of its own and bytes of its own, before the directory.

    Raises ValueError if one has not.
    """
    after = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        file.seek(entry.header_offset)
        header = struct.unpack("<4s5H3L2H", file.read(30))
        begin = entry.header_offset + 30 + sum(header[-2:])
        longer = len(entry.extra) > 4 and entry.extra[:2] == b"\1\0"
        sized = (
            struct.unpack("<H", entry.extra[2:4]) == (len(entry.extra) - 4,) if longer else False
        )
        if (
            header[0] != b"PK\3\4"
            or entry.header_offset < after
            or entry.compress_size != entry.file_size
            or not _RECORD.fullmatch(entry.filename)
            or (entry.extra and not sized)
        ):
            raise ValueError(f"its record {shown(entry.filename)} is not as torch.save writes one")
        after = begin + entry.file_size
    if after > stop or len({entry.filename.lower() for entry in entries}) < len(entries):
        raise ValueError("its records are not apart")


def _check_record(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Read a record piece by piece; the archive raises if its checksum differs."""
    if entry.CRC == 0:  # torch can be told to omit checksums
        return
    with archive.open(entry) as record:
        while record.read(_PIECE):
            pass


def _opened(path: Path, records: list[int]) -> dict[str, Tensor]:
    print(
        f"llm-wsae: {printable(str(path))} is a pickle; only tensors are taken from it (torch's "
        "weights_only loader), nothing in it is run",
        file=sys.stderr,
    )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        UnpicklingError,
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        EOFError,
        OSError,
        MemoryError,
        ImportError,
    ) as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        raise LlmWsaeError(
            f"{path} holds something other than a dictionary's tensors, or is damaged: {reason}"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and _is_plain(tensor) for name, tensor in found.items()
    ):
        raise LlmWsaeError(f"{path} is not a dictionary: it should hold tensors by name")
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in found.values()}
    if sorted(s.nbytes() for s in storages.values() if s.nbytes()) != sorted(filter(None, records)):
        raise LlmWsaeError(f"{path} is damaged: its tensors do not have the sizes of its records")
    return found


def _is_plain(tensor: Any) -> bool:
    """An ordinary tensor in memory: not sparse, quantised or without data."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
    )


LAYOUT = Layout("dictionary_learning", CONFIG, WEIGHTS, announce, read)
