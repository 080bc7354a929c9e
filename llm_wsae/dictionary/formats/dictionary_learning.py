"""saprmarks' dictionary_learning: ``config.json`` and ``ae.pt``, which is a pickle.

A pickle can run code, so it is opened only with torch's ``weights_only`` loader, which accepts
nothing but tensors and containers, and the user is told. Before that, the archive around it is
written anew: its records may not be larger than ``config.json`` announces, must match the checksums
stored with them, and torch reads the bytes that were checked.

The classes, by ``dict_class``: AutoEncoder subtracts its bias from the input and is used with
decoder columns of unit norm, AutoEncoderNew does neither; AutoEncoderTopK; GatedAutoEncoder;
BatchTopKSAE and MatryoshkaBatchTopKSAE encode with one threshold; JumpReluAutoEncoder has one per
latent and does not subtract its bias.
"""

import io
import math
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from llm_wsae.dictionary.folder import check_finite, check_shapes
from llm_wsae.dictionary.formats.layout import (
    Layout,
    Weights,
    folded,
    foreign_info,
    gated_as_jumprelu,
    sizes,
    sparsity_of,
    with_decoder_norms,
    without_input_bias,
)
from llm_wsae.dictionary.info import Facts
from llm_wsae.errors import LlmWsaeError, nearest, shown
from llm_wsae.outside import integer, mapping, parsing, text
from llm_wsae.terminal import printable

_NAME, _CONFIG, _WEIGHTS = "dictionary_learning", "config.json", "ae.pt"
_LARGEST_PICKLE = 1 << 20  # bytes of everything except tensors: names and shapes
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


def _announce(config: Mapping[str, Any], place: PurePath) -> Facts:
    trainer, buffer = mapping(config.get("trainer")), mapping(config.get("buffer"))
    kind, _ = _CLASSES.get(text(trainer.get("dict_class")) or "", (None, ()))
    info = foreign_info(
        _NAME,
        place,
        _site(trainer),
        model=text(trainer.get("lm_name")),
        context_size=integer(buffer.get("ctx_len")),
    )
    d_in, d_sae = integer(trainer.get("activation_dim")), integer(trainer.get("dict_size"))
    k = integer(trainer.get("k")) if kind == "topk" else None
    return Facts(place.name, kind, d_in, d_sae, k, info)


def _site(trainer: Mapping[str, Any]) -> str | None:
    """The block and module that they name; a block alone may mean any of its parts."""
    block, module = integer(trainer.get("layer")), text(trainer.get("submodule_name"))
    if block is None or module is None:
        return None
    match = _POINT.match(module)
    return f"blocks.{block}.hook_{match[0]}" if match else module


def _read(folder: Path, config: Mapping[str, Any], said: Facts) -> Weights:
    """The tensors with centring, norms and gates folded in."""
    path = folder / _CONFIG
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
    d_in, d_sae = sizes(path, said)
    sparsity = sparsity_of(path, said, "jumprelu" if kind == "gated" else kind)
    w = _tensors(folder / _WEIGHTS, wanted, d_in, d_sae)
    W_enc = w["W_enc"] if "W_enc" in w else w["encoder.weight"].T
    W_dec = w["W_dec"] if "W_dec" in w else w["decoder.weight"].T
    b_dec = next(w[n] for n in ("b_dec", "bias", "decoder.bias", "decoder_bias") if n in w)
    threshold = w["threshold"].expand(d_sae) if "threshold" in wanted else None
    if kind == "gated":
        gates = w["r_mag"], w["gate_bias"], w["mag_bias"]
        W_enc, b_enc, threshold = gated_as_jumprelu(W_enc, *gates)
    else:
        b_enc = w["b_enc"] if "b_enc" in w else w["encoder.bias"]
    if name == "AutoEncoder" and not _unit_rows(W_dec):
        W_enc, b_enc, W_dec = with_decoder_norms(W_enc, b_enc, W_dec)
    if name not in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        b_enc = without_input_bias(W_enc, b_enc, b_dec)
    return folded(W_enc, W_dec, b_enc, b_dec, threshold), sparsity


def _unit_rows(W_dec: Tensor) -> bool:
    """The other tool's own test, by which it leaves nearly normalised rows as they are."""
    norms = W_dec.norm(dim=1)
    return torch.allclose(norms, torch.ones_like(norms))


def _tensors(path: Path, wanted: tuple[str, ...], d_in: int, d_sae: int) -> dict[str, Tensor]:
    """The wanted tensors, float32, finite, of the shapes they must have."""
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(wanted, (d_sae,)),
        "encoder.weight": (d_sae, d_in),
        "decoder.weight": (d_in, d_sae),
        "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in),
        **dict.fromkeys(("bias", "decoder.bias", "decoder_bias", "b_dec"), (d_in,)),
    }
    if "W_enc" not in wanted:
        shapes["threshold"] = ()
    found = _opened(path, sum(8 * math.prod(shapes[name]) for name in wanted))
    if missing := sorted(set(wanted) - set(found)):
        raise LlmWsaeError(f"{path} lacks the tensors {', '.join(missing)}")
    if strange := sorted(map(str, set(found) - set(wanted) - _UNUSED)):
        raise LlmWsaeError(f"{path} holds unexpected tensors {', '.join(map(repr, strange))}")
    tensors = {name: found[name] for name in wanted}
    if "threshold" in wanted and tensors["threshold"].ndim == 0:
        shapes["threshold"] = ()
    check_shapes(path, tensors, {name: shapes[name] for name in wanted}, _CONFIG)
    for name, tensor in tensors.items():
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # one stored number expanded to many
            raise LlmWsaeError(f"{path}: {name} is not stored in full")
    check_finite(tensors, str(path))
    return {name: tensor.float() for name, tensor in tensors.items()}


def _opened(path: Path, largest: int) -> dict[Any, Tensor]:
    """What the pickle holds, by name; its tensors take at most ``largest`` bytes."""
    print(
        f"llm-wsae: {printable(str(path))} is a pickle; only tensors are taken from it (torch's "
        "weights_only loader), nothing in it is run",
        file=sys.stderr,
    )
    with parsing(f"{path} is not a complete file of torch.save"):
        checked, sizes = _checked(path, largest)
    with parsing(f"{path} holds something other than a dictionary's tensors, or is damaged"):
        found = torch.load(checked, map_location="cpu", weights_only=True)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in found.values()}
    # torch believes the pickle about the size of a record, and would read beyond it.
    if sorted(s.nbytes() for s in storages.values() if s.nbytes()) != sorted(filter(None, sizes)):
        raise LlmWsaeError(f"{path} is damaged: its tensors do not have the sizes of its records")
    return found


def _checked(path: Path, largest: int) -> tuple[io.BytesIO, list[int]]:
    """The archive, written anew in memory, and the sizes in bytes of its tensors' records."""
    made = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(made, "w") as copy:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > largest + _LARGEST_PICKLE:
            raise LlmWsaeError(f"{path} is larger than the dictionary that {_CONFIG} describes")
        if len({entry.filename.lower() for entry in entries}) < len(entries):
            raise ValueError("two of its records have one name")
        for entry in entries:
            copy.writestr(entry.filename, archive.read(entry))  # raises if the checksum differs
    made.seek(0)
    return made, [entry.file_size for entry in entries if "/data/" in entry.filename]


LAYOUT = Layout(_NAME, _CONFIG, _WEIGHTS, _announce, _read)
