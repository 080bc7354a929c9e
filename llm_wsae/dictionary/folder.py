"""The dictionary folder: two files that SAELens reads, and others for what SAELens does not know.

    cfg.json                  SAELens ≥ 6 configuration
    sae_weights.safetensors   W_enc, W_dec, b_enc, b_dec, and threshold for JumpReLU
    wsae.json                 how it was made (``DictionaryInfo``), format version, checksums of
                              the other three and of itself
    wsae.safetensors          gamma [d_in] or [d_in, d_in], statistics of the rows
    explanations.jsonl        what a language model said of its latents (``explanations``), if asked

The folder is written under a temporary name and renamed, so half a dictionary is never found under
its name. A dictionary may come from the Hub, so reading trusts nothing: every byte is compared with
its checksum, and what the files' headers say with ``cfg.json`` before a tensor is allocated.
"""

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_wsae.artifact.files import (
    read_json,
    read_own_json,
    remove_partials,
    save_tensors,
    sha256,
    write_atomic,
    write_json,
)
from llm_wsae.artifact.provenance import version_of
from llm_wsae.dictionary.atomic_folder import not_there, replacing, retry_if_replaced, writing
from llm_wsae.dictionary.checks import check_finite, read_tensors
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.dictionary.sparsity import Sparsity, sparsity_from_settings
from llm_wsae.errors import LlmWsaeError, UsageError, shown
from llm_wsae.model.site import Site
from llm_wsae.outside import integer, mapping

FORMAT = "llm-wsae dictionary"
FORMAT_VERSION = 1
CFG, WEIGHTS, INFO, EXTRAS = (
    "cfg.json",
    "sae_weights.safetensors",
    "wsae.json",
    "wsae.safetensors",
)
EXPLANATIONS = "explanations.jsonl"
OWN_DIGEST = "own_sha256"
"""Key in ``wsae.json`` of its own digest; those of the other files are under ``sha256``."""
_OWN_FILES = {CFG, WEIGHTS, INFO, EXTRAS}
_PROVED = (CFG, WEIGHTS, EXTRAS)
WAY_OUT = "restore the dictionary from a copy, train it again or pull it again"
_STORED_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_EXTRAS_DTYPES = {"F64", *_STORED_DTYPES.values()}
# The version whose layout cfg.json follows: SAELens rewrites configurations of versions below 6.
_SAELENS_LAYOUT = "6.0.0"


def names_of(folders: Iterable[Path]) -> dict[str, Path]:
    """Dictionary folders by the names to show: those of the folders, or whole paths where several
    have the same name. Raises UsageError if there is none."""
    different = dict.fromkeys(folders)
    if not different:
        raise UsageError("name at least one dictionary folder")
    names = [os.path.basename(os.path.abspath(path)) for path in different]  # also of . and ..
    return {
        name if names.count(name) == 1 else str(path): path
        for name, path in zip(names, different, strict=True)
    }


@dataclass(frozen=True)
class Content:
    """What a dictionary folder holds."""

    weights: dict[str, Tensor]
    """W_enc, W_dec, b_enc and b_dec; float32 when ``read_folder`` returns them."""
    sparsity: Sparsity
    info: DictionaryInfo
    extras: dict[str, Tensor]
    """``gamma`` and statistics, by name."""
    weights_sha256: str | None = None
    """Of the file of weights; None for other tools' folders."""


def saelens_config(
    d_in: int, d_sae: int, sparsity: Sparsity, info: DictionaryInfo
) -> dict[str, Any]:
    """The ``cfg.json`` with which SAELens ≥ 6 computes what ``Dictionary`` computes.

    Its dtype is that of the computation, float32, whatever the file's: SAELens converts on load.
    """
    return {
        "architecture": sparsity.architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **sparsity.settings(),
        "metadata": {
            "sae_lens_version": _SAELENS_LAYOUT,
            "sae_lens_training_version": None,
            "model_name": info.model.get("name"),
            "hook_name": info.site,
            "hook_head_index": None,
            "context_size": info.context_size,
            "prepend_bos": info.prepend_bos,
            "dataset_path": info.corpus.get("name"),
            "model_from_pretrained_kwargs": {},
        },
    }


def write_folder(
    folder: Path,
    weights: dict[str, Tensor],
    sparsity: Sparsity,
    info: DictionaryInfo,
    extras: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a dictionary folder atomically, its matrices in ``dtype``.

    Raises UsageError for a dtype that cannot be stored; LlmWsaeError if a weight is NaN or infinite
    after rounding, if ``folder`` is not a dictionary or holds other files as well, or if it cannot
    be written. What was there is then unchanged.
    """
    if dtype not in _STORED_DTYPES:
        raise UsageError(
            f"a dictionary cannot be saved as {dtype}; choose float32, bfloat16 or float16"
        )
    d_in, d_sae = weights["W_enc"].shape
    # Vectors stay exact: they are small, and b_enc and threshold affect every row's selection.
    stored = {key: w.detach().to(dtype if w.ndim == 2 else w.dtype) for key, w in weights.items()}
    for tensors in (stored, extras):
        check_finite(tensors, f"the dictionary for {folder}")
    with replacing(folder, check_replaceable) as new:
        save_tensors(new / WEIGHTS, stored)
        save_tensors(new / EXTRAS, extras)
        write_json(new / CFG, saelens_config(d_in, d_sae, sparsity, info), key=None)
        write_json(
            new / INFO,
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "package_version": version_of("llm-wsae"),
                "sha256": {name: sha256(new / name) for name in _PROVED},
                **info.to_dict(),
            },
            key=OWN_DIGEST,
        )
        _carry_explanations(folder, new)


def copy_folder(source: Path, folder: Path) -> None:
    """Copy a dictionary folder byte for byte, atomically; an older dictionary is replaced. What was
    said of the latents there stays if the weights are the same.

    Raises LlmWsaeError as ``write_folder`` does; what was there is then unchanged.
    """
    with replacing(folder, check_replaceable) as new:
        for name in sorted(_OWN_FILES):
            write_atomic(new / name, functools.partial(shutil.copyfile, source / name))
        _carry_explanations(folder, new)
        said = source / EXPLANATIONS
        if said.is_file() and not (new / EXPLANATIONS).exists():
            write_atomic(new / EXPLANATIONS, functools.partial(shutil.copyfile, said))


def _carry_explanations(old: Path, new: Path) -> None:
    """What was said of a dictionary's latents stays when the same weights are saved again."""
    there = old / EXPLANATIONS
    if there.is_file() and weights_checksum(old) == weights_checksum(new):
        shutil.copyfile(there, new / EXPLANATIONS)


def weights_checksum(folder: Path) -> Any:
    """The SHA-256 of the weights that a dictionary's description holds; None if it holds none.

    Raises LlmWsaeError if the description cannot be read.
    """
    saved = read_json(folder / INFO, "dictionary's information").get("sha256")
    return saved.get(WEIGHTS) if isinstance(saved, dict) else None


def is_dictionary(folder: Path) -> bool:
    """Whether the folder is marked as a dictionary of this package."""
    try:
        header = read_json(Path(folder) / INFO, "dictionary's information")
    except LlmWsaeError:
        return False
    return isinstance(header, dict) and header.get("format") == FORMAT


def read_folder(folder: Path) -> Content:
    """Read a dictionary folder of this package.

    Raises LlmWsaeError, naming file and fault, if it is missing, foreign, of a newer format,
    truncated, changed since it was saved, inconsistent, of an unknown architecture, or holds NaN or
    infinite numbers.
    """
    stored = _stored(folder)
    # Copied out of the mapped file, whose pages would change or vanish with it.
    weights = {key: w.to(torch.float32, copy=True) for key, w in stored.weights.items()}
    extras = {key: tensor.clone() for key, tensor in stored.extras.items()}
    return dataclasses.replace(stored, weights=weights, extras=extras)


def check_folder(folder: Path) -> DictionaryInfo:
    """Check that ``read_folder`` would succeed, in no more memory than the files take.

    Raises LlmWsaeError as ``read_folder`` does.
    """
    return retry_if_replaced(folder, lambda: _stored(folder)).info


def _stored(folder: Path) -> Content:
    """The folder's content, its weights in the file's dtype (pages of the mapped file)."""
    if not folder.is_dir():
        raise not_there(folder)
    missing = sorted(name for name in _OWN_FILES if not (folder / name).is_file())
    if missing:
        raise LlmWsaeError(
            f"{folder} is not a complete dictionary folder of this package: it lacks "
            f"{' and '.join(missing)}"
        )
    values = _read_info(folder)
    info = _info_of(folder / INFO, values)
    _check_digests(folder, values.get("sha256"))
    d_in, d_sae, sparsity = _read_cfg(folder / CFG, info)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    if sparsity.has_threshold:
        shapes["threshold"] = (d_sae,)
    weights = read_tensors(folder / WEIGHTS, "weights file", shapes, set(_STORED_DTYPES.values()))
    extras = read_tensors(folder / EXTRAS, "side tensors", None, _EXTRAS_DTYPES, d_in)
    return Content(weights, sparsity, info, extras, values["sha256"][WEIGHTS])


def _check_digests(folder: Path, saved: Any) -> None:
    """The files must hold the bytes that were saved, which what they say cannot show."""
    digests = saved if isinstance(saved, dict) else {}
    if changed := [name for name in _PROVED if digests.get(name) != sha256(folder / name)]:
        raise LlmWsaeError(
            f"in {folder}, {' and '.join(changed)} changed since it was saved (by the checksums in "
            f"{INFO}); {WAY_OUT}, or, if SAELens was meant to write there, remove {INFO} and "
            f"{EXTRAS} to load it as a SAELens dictionary"
        )


def _read_info(folder: Path) -> dict[str, Any]:
    """The content of ``wsae.json``, proved."""
    path = folder / INFO
    values = read_own_json(path, "dictionary's information", WAY_OUT, key=OWN_DIGEST)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise LlmWsaeError(f"{path} is not the information file of a dictionary of this package")
    return values


def _info_of(path: Path, values: dict[str, Any]) -> DictionaryInfo:
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise LlmWsaeError(
            f"{path} has the format version {shown(version)}, but this package reads "
            f"{FORMAT_VERSION}; update llm-wsae"
        )
    try:
        info = DictionaryInfo.from_dict(values)
        Site.parse(info.site)
    except LlmWsaeError as error:
        raise LlmWsaeError(f"{path}: {error}") from None
    return info


def _read_cfg(path: Path, info: DictionaryInfo) -> tuple[int, int, Sparsity]:
    cfg = mapping(read_json(path, "dictionary's configuration"))
    d_in, d_sae = integer(cfg.get("d_in")), integer(cfg.get("d_sae"))
    try:
        sparsity = sparsity_from_settings(cfg)
        if d_in is None or d_sae is None or min(d_in, d_sae) < 1:
            sizes = ", ".join(f"{name} = {shown(cfg.get(name))}" for name in ("d_in", "d_sae"))
            raise LlmWsaeError(sizes)
        sparsity.check(d_sae)
    except LlmWsaeError as error:
        raise LlmWsaeError(f"{path} cannot be a dictionary's: {error}") from None
    # Any other value of these keys would change what the weights mean.
    expected = saelens_config(d_in, d_sae, sparsity, info)
    for key in expected.keys() - {"metadata", "dtype", "device"}:
        if cfg.get(key) != expected[key]:
            raise LlmWsaeError(
                f"{path} has {key} = {shown(cfg.get(key))}, but a dictionary of this package is "
                f"always saved with {expected[key]!r}"
            )
    return d_in, d_sae, sparsity


def check_replaceable(folder: Path) -> None:
    """Raises LlmWsaeError unless the folder is missing, empty, or a dictionary and nothing else."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise LlmWsaeError(f"{folder} is not a folder, so no dictionary can be saved there")
    if is_dictionary(folder):
        remove_partials(folder)  # left by a kill while its measurements were written
    names = {entry.name for entry in folder.iterdir()}
    if not names:
        return
    strange = sorted(names - _OWN_FILES - {EXPLANATIONS})
    if strange or not is_dictionary(folder):
        found = strange[0] if strange else "no sign that this package made it"
        raise LlmWsaeError(
            f"{folder} is not just a dictionary (it holds {found}); save into another folder"
        )


def check_keeps_measurements(folder: Path, weights: str | None = None) -> None:
    """Raises UsageError for a folder that must not be written to: other tools' files are left
    alone, and so are links, which lead into the Hub's cache. Raises LlmWsaeError if ``weights``,
    the SHA-256 of the weights that something was found out about, is not that of the folder's."""

    def check() -> None:
        if not is_dictionary(folder):
            raise UsageError(
                f"{folder} was not saved by this package, so measurements cannot be kept in it"
            )
        if (folder / INFO).is_symlink():
            raise UsageError(
                f"{folder / INFO} is only a link, so measurements are not kept there; copy the "
                "dictionary first, e.g. with llm-wsae pull"
            )
        if weights not in (None, weights_checksum(folder)):
            raise LlmWsaeError(
                f"the dictionary in {folder} was replaced by another one during the work, so the "
                "results are not kept with it; run the same command again for the new one"
            )

    retry_if_replaced(folder, check)


def keep_measurements(
    folder: Path, found: Mapping[str, Mapping[str, Any]], weights: str | None = None
) -> None:
    """Store groups of measurements (``fidelity``, ``monosemanticity``; JSON values) in the metrics
    of a dictionary's folder, replacing older ones of the same group.

    ``weights`` is ``Dictionary.weights_sha256`` of the dictionary that was measured. Raises as
    ``check_keeps_measurements`` does, and LlmWsaeError if the file cannot be read or written; it is
    then unchanged.
    """
    change_measurements(folder, lambda old: found, weights)


def change_measurements(
    folder: Path,
    change: Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, Any]]],
    weights: str | None = None,
) -> None:
    """``keep_measurements`` for groups that ``change`` computes from the metrics that are there."""
    with writing(folder):
        check_keeps_measurements(folder, weights)
        info = _read_info(folder)
        old = mapping(info.get("metrics"))
        write_json(folder / INFO, {**info, "metrics": {**old, **change(old)}}, key=OWN_DIGEST)
