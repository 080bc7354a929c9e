"""saprmarks' dictionary_learning: ``config.json`` and ``ae.pt``, which is a pickle.

A pickle can run code, so the user is told, and torch's ``weights_only`` loader opens it, which
accepts nothing but tensors and containers. It reads a copy of the archive, whose records are not
larger than ``config.json`` announces and match the checksums stored with them.

The classes, by ``dict_class``: AutoEncoder subtracts its bias from the input and is used with
decoder columns of unit norm, AutoEncoderNew does neither; AutoEncoderTopK; GatedAutoEncoder;
BatchTopKSAE and MatryoshkaBatchTopKSAE encode with one threshold; JumpReluAutoEncoder has one per
latent and does not subtract its bias.
"""

import io
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from llm_wsae.dictionary.folder import check_finite
from llm_wsae.dictionary.formats.folding import fold, named, named_only
from llm_wsae.dictionary.info import Facts
from llm_wsae.errors import LlmWsaeError, nearest, shown
from llm_wsae.outside import integer, mapping, parsing, text
from llm_wsae.terminal import printable

CONFIG, WEIGHTS = "config.json", "ae.pt"
_LARGEST_PICKLE = 1 << 20  # bytes of everything except tensors: names and shapes
_POINT = re.compile(r"resid_(pre|mid|post)")
# Names of tensors, and SAELens' for them.
_MATRICES = {"encoder.weight": "W_enc.T", "decoder.weight": "W_dec.T"}
_LINEAR = {**_MATRICES, "encoder.bias": "b_enc"}
_GATES = {"decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag"}
_ROWS = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
# Each class: SAELens' name for its kind, whether it subtracts its bias from the input, its tensors.
_CLASSES: dict[str, tuple[str, bool, dict[str, str]]] = {
    "AutoEncoder": ("standard", True, {**_LINEAR, "bias": "b_dec"}),
    "AutoEncoderNew": ("standard", False, {**_LINEAR, "decoder.bias": "b_dec"}),
    "GatedAutoEncoder": ("gated", True, {**_MATRICES, **_GATES}),
    "AutoEncoderTopK": ("topk", True, {**_LINEAR, "b_dec": "b_dec"}),
    "BatchTopKSAE": ("jumprelu", True, {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True, _ROWS),
    "JumpReluAutoEncoder": ("jumprelu", False, _ROWS),
}
_UNUSED = {"k", "threshold", "group_sizes"}  # may be there but have no part in encoding


def announce(config: Mapping[str, Any], place: PurePath) -> Facts:
    """What ``config.json`` says."""
    trainer, buffer = mapping(config.get("trainer")), mapping(config.get("buffer"))
    kind, *_ = _CLASSES.get(text(trainer.get("dict_class")) or "", (None,))
    k = trainer.get("k") if kind == "topk" else None
    return Facts.foreign(
        "dictionary_learning",
        place,
        _site(trainer),
        kind,
        (trainer.get("activation_dim"), trainer.get("dict_size"), k),
        model=named_only(text(trainer.get("lm_name"))),
        context_size=integer(buffer.get("ctx_len")),
    )


def _site(trainer: Mapping[str, Any]) -> str | None:
    """The block and module that they name; a block alone may mean any of its parts."""
    block, module = integer(trainer.get("layer")), text(trainer.get("submodule_name"))
    if block is None or module is None:
        return None
    match = _POINT.match(module)
    return f"blocks.{block}.hook_{match[0]}" if match else module


def read(folder: Path, config: Mapping[str, Any], said: Facts) -> dict[str, Tensor]:
    """The tensors of ``ae.pt``, folded as their class uses them."""
    name = str(mapping(config.get("trainer")).get("dict_class"))
    if name not in _CLASSES:
        raise LlmWsaeError(
            f"{folder / CONFIG} has the dict_class {shown(name)}, which this package does not "
            f"read; {nearest(name, _CLASSES)}"
        )
    rows = mapping(config.get("buffer")).get("io", "out")
    if rows not in ("in", "out"):
        raise LlmWsaeError(
            f"{folder / CONFIG} describes a transcoder (io = {shown(rows)}), which does not "
            "reconstruct its own input"
        )
    _, subtracts_bias, wanted = _CLASSES[name]
    d_in, d_sae, path = said.d_in or 0, said.d_sae or 0, folder / WEIGHTS
    found = _opened(path, 8 * (2 * d_in * d_sae + 5 * d_sae + d_in))
    tensors = {key: t for key, t in found.items() if key in wanted or key not in _UNUSED}
    check_finite(tensors, str(path))
    threshold = tensors.get("threshold")
    if threshold is not None and threshold.ndim == 0:  # one for all latents
        tensors["threshold"] = threshold.expand(d_sae)
    w = named(path, tensors, wanted, said)
    norms = w["W_dec"].norm(dim=1)
    # As the tool tests it; it leaves nearly normalised rows as they are.
    by_norm = name == "AutoEncoder" and not torch.allclose(norms, torch.ones_like(norms))
    return fold(w, subtracts_bias=subtracts_bias, selects_by_norm=by_norm)


def _opened(path: Path, largest: int) -> dict[str, Tensor]:
    """The tensors that the pickle holds, by name; they take at most ``largest`` bytes."""
    print(
        f"llm-wsae: {printable(str(path))} is a pickle; only tensors are taken from it (torch's "
        "weights_only loader), nothing in it is run",
        file=sys.stderr,
    )
    with parsing(f"{path} is not a complete file of torch.save"):
        checked, sizes = _checked(path, largest)
    with parsing(f"{path} holds something other than a dictionary's tensors, or is damaged"):
        loaded = torch.load(checked, map_location="cpu", weights_only=True)
        found = {str(name): tensor for name, tensor in loaded.items()}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in found.values()}
    # torch believes the pickle about the size of a record, and would read beyond it.
    if sorted(s.nbytes() for s in storages.values() if s.nbytes()) != sorted(filter(None, sizes)):
        raise LlmWsaeError(f"{path} is damaged: its tensors do not have the sizes of its records")
    for name, tensor in found.items():
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # one stored number expanded to many
            raise LlmWsaeError(f"{path}: {name} is not stored in full")
    return found


def _checked(path: Path, largest: int) -> tuple[io.BytesIO, list[int]]:
    """The archive, written anew in memory, and the sizes in bytes of its tensors' records."""
    made = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(made, "w") as copy:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > largest + _LARGEST_PICKLE:
            raise LlmWsaeError(f"{path} is larger than the dictionary that {CONFIG} describes")
        for entry in entries:
            copy.writestr(entry.filename, archive.read(entry))  # raises if the checksum differs
    made.seek(0)
    return made, [entry.file_size for entry in entries if "/data/" in entry.filename]
