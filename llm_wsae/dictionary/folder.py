"""The dictionary folder: two files that SAELens reads, and others for what SAELens does not know.

    cfg.json                  SAELens ≥ 6 configuration
    sae_weights.safetensors   W_enc, W_dec, b_enc, b_dec, threshold for JumpReLU, W_skip for a skip
    wsae.json                 how it was made (``DictionaryInfo``), format version, checksums of
                              the other three and of itself
    wsae.safetensors          gamma [d_in] or [d_in, d_in], statistics of the rows
    explanations.jsonl        what a language model said of its latents (``explanations``), if asked

A folder is written under a temporary name and renamed, one writer at a time, so half a dictionary
is never found under its name. A dictionary may come from the Hub, so reading trusts nothing: every
byte is compared with its checksum, and the names and numbers of the tensors are checked.
"""

import fcntl
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from llm_wsae.artifact.files import (
    load_tensors,
    read_json,
    read_own_json,
    refusals_to_write,
    remove_partials,
    save_tensors,
    sha256,
    write_atomic,
    write_json,
    write_text,
)
from llm_wsae.artifact.provenance import version_of
from llm_wsae.dictionary.info import DictionaryInfo, Facts
from llm_wsae.dictionary.sparsity import Sparsity, TopK, architecture_of, kind_of, sparsity_of
from llm_wsae.errors import LlmWsaeError, UsageError, shown
from llm_wsae.model.site import Site
from llm_wsae.outside import mapping

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
INFO, EXTRAS = "wsae.json", "wsae.safetensors"
EXPLANATIONS = "explanations.jsonl"
_FORMAT, _FORMAT_VERSION = "llm-wsae dictionary", 1
_INFO = "dictionary's information"
_PROVED = (CFG, WEIGHTS, EXTRAS)
WAY_OUT = "restore the dictionary from a copy, train it again or pull it again"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PIECE = 1 << 20  # numbers checked at once
# The version whose layout cfg.json follows: SAELens rewrites configurations of versions below 6.
_SAELENS_LAYOUT = "6.0.0"
_Groups = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Content:
    """What a dictionary folder holds; its tensors may be pages of the files."""

    weights: dict[str, Tensor]
    sparsity: Sparsity
    info: DictionaryInfo
    extras: dict[str, Tensor]
    weights_sha256: str | None = None  # of the file of weights; None for other tools' folders


def names_of(folders: Iterable[Path]) -> dict[str, Path]:
    """Dictionary folders by the names to show: their own, or whole paths where several have the
    same. Raises UsageError if there is none."""
    different = dict.fromkeys(folders)
    if not different:
        raise UsageError("name at least one dictionary folder")
    names = [os.path.basename(os.path.abspath(path)) for path in different]  # also of . and ..
    return {
        name if names.count(name) == 1 else str(path): path
        for name, path in zip(names, different, strict=True)
    }


def write_folder(folder: Path, content: Content, dtype: torch.dtype = torch.float32) -> None:
    """Write a dictionary folder atomically, its matrices in ``dtype``. Raises UsageError if that
    cannot be stored, LlmWsaeError for weights that are not finite once rounded, and if the
    folder cannot be written or holds anything but a dictionary, which then stays as it is."""
    if dtype not in _DTYPES:
        raise UsageError(
            f"a dictionary cannot be saved as {dtype}; choose float32, bfloat16 or float16"
        )
    # Vectors stay exact: they are small, and b_enc and threshold affect every row's selection.
    stored = {
        name: w.detach().to(dtype if w.ndim == 2 else w.dtype)
        for name, w in content.weights.items()
    }
    check_finite({**stored, **content.extras}, f"the dictionary for {folder}")
    with _replacing(folder) as new:
        save_tensors(new / WEIGHTS, stored)
        save_tensors(new / EXTRAS, content.extras)
        cfg = json.dumps(_saelens_config(content), indent=1, ensure_ascii=False)
        write_text(new / CFG, cfg + "\n")
        about = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "package_version": version_of("llm-wsae"),
            "sha256": {name: sha256(new / name) for name in _PROVED},
            **asdict(content.info),
        }
        write_json(new / INFO, about)
        _carry_explanations(folder, new)


def _saelens_config(content: Content) -> dict[str, Any]:
    """The ``cfg.json`` with which SAELens ≥ 6 computes what ``Dictionary`` computes."""
    sparsity, info = content.sparsity, content.info
    d_in, d_sae = content.weights["W_enc"].shape
    topk = {"k": sparsity.k, "rescale_acts_by_decoder_norm": False}
    site, of_transcoder = Site.parse(info.site), {}
    if site.is_mlp:
        of_transcoder = {"d_out": d_in}
    return {
        "architecture": architecture_of(sparsity, site.is_mlp, "W_skip" in content.weights),
        "d_in": d_in,
        **of_transcoder,
        "d_sae": d_sae,
        "dtype": "float32",  # of the computation: SAELens converts on load
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **(topk if isinstance(sparsity, TopK) else {}),
        "metadata": {
            "sae_lens_version": _SAELENS_LAYOUT,
            "sae_lens_training_version": None,
            "model_name": info.model.get("name"),
            "hook_name": str(site.reads),
            **({"hook_name_out": str(site.writes)} if site.is_mlp else {}),
            "hook_head_index": None,
            "context_size": info.context_size,
            "prepend_bos": info.prepend_bos,
            "dataset_path": info.corpus.get("name"),
            "model_from_pretrained_kwargs": {},
        },
    }


def copy_folder(source: Path, folder: Path) -> None:
    """Copy a dictionary folder byte for byte, atomically; an older dictionary is replaced. What was
    said of the latents there stays if the weights are the same. Raises as ``write_folder`` does."""
    with _replacing(folder) as new:
        for name in (*_PROVED, INFO):
            _copy(source / name, new)
        for place in (source, folder):  # the latter's stay
            _carry_explanations(place, new)


def _carry_explanations(old: Path, new: Path) -> None:
    there = old / EXPLANATIONS
    if there.is_file() and weights_checksum(old) == weights_checksum(new):
        _copy(there, new)


def _copy(file: Path, folder: Path) -> None:
    write_atomic(folder / file.name, functools.partial(shutil.copyfile, file))


def check_replaceable(folder: Path) -> None:
    """Raises LlmWsaeError unless the folder is missing, empty, or a dictionary and nothing else."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise LlmWsaeError(f"{folder} is not a folder, so no dictionary can be saved there")
    if is_dictionary(folder):
        remove_partials(folder)  # left by a kill while its measurements were written
    names = {entry.name for entry in folder.iterdir()}
    strange = sorted(names - {*_PROVED, INFO, EXPLANATIONS})
    if strange or (names and not is_dictionary(folder)):
        found = strange[0] if strange else "no sign that this package made it"
        raise LlmWsaeError(
            f"{folder} is not just a dictionary (it holds {found}); save into another folder"
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Let one process or thread at a time write to a folder that may be replaced; others wait. The
    lock is a file beside it, as one inside would be replaced too. Raises LlmWsaeError if it cannot
    be made."""
    folder = Path(os.path.realpath(folder))
    path = folder.with_name(f".{folder.name}.writing")
    with refusals_to_write(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(path)
    with handle:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before the lock is released


def _locked(path: Path) -> IO[str]:
    while True:
        handle = open(path, "a")  # noqa: SIM115 - held by the caller
        fcntl.flock(handle, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):  # the one who held it before deleted it
            if os.path.samestat(os.fstat(handle.fileno()), os.stat(path)):
                return handle
        handle.close()


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """The path of a new folder, which replaces ``folder`` if the block succeeds."""
    with writing(folder):
        _clear_up(folder)
        check_replaceable(folder)
        try:
            yield _beside(folder, "new")
            if folder.exists():  # a kill between the two renames leaves it to ``clear_up``
                os.rename(folder, _beside(folder, "old"))
            os.rename(_beside(folder, "new"), folder)
        finally:
            _clear_up(folder)


def clear_up(folder: Path, lock: bool = False) -> None:
    """Bring back a folder that a killed writer left renamed, and delete what else it left; its lock
    file only if ``lock``, because a reader waits for no writer."""
    left = ("new", "old", "writing") if lock else ("new", "old")
    if any(_beside(folder, what).exists() for what in left):
        with writing(folder):
            _clear_up(folder)


def _clear_up(folder: Path) -> None:
    old = _beside(folder, "old")
    if old.exists() and not os.path.lexists(folder):
        os.rename(old, folder)
    for path in (old, _beside(folder, "new")):
        shutil.rmtree(path, ignore_errors=True)


def _beside(folder: Path, what: str) -> Path:
    """Where the ``new`` folder is written, or the ``old`` one is moved."""
    folder = Path(os.path.abspath(folder))
    return folder.with_name(f".{folder.name}.{what}")


def weights_checksum(folder: Path) -> Any:
    """The SHA-256 of the weights, as the folder's description gives it; None if it gives none.
    Raises LlmWsaeError if it cannot be read."""
    return mapping(_described(folder).get("sha256")).get(WEIGHTS)


def is_dictionary(folder: Path) -> bool:
    """Whether the folder is marked as a dictionary of this package."""
    try:
        return _described(Path(folder)).get("format") == _FORMAT
    except LlmWsaeError:
        return False


def _described(folder: Path) -> Mapping[str, Any]:
    return mapping(read_json(folder / INFO, _INFO))


def files_in(folder: Path) -> set[str]:
    """The names of a dictionary folder's files; one that a killed writer left renamed is brought
    back first. Raises LlmWsaeError if there is no folder."""
    if not os.path.lexists(folder):
        clear_up(folder)
    if not folder.is_dir():
        raise LlmWsaeError(f"{folder} is not a folder, so no dictionary can be loaded from it")
    return {entry.name for entry in folder.iterdir()}


def read_folder(folder: Path) -> Content:
    """Read a dictionary folder of this package. Raises LlmWsaeError, naming file and fault, for
    whatever is wrong with it but the tensors' shapes, which ``Dictionary`` checks."""
    files_in(folder)  # refuses what is no folder
    if missing := [name for name in (*_PROVED, INFO) if not (folder / name).is_file()]:
        raise LlmWsaeError(
            f"{folder} is not a complete dictionary folder of this package: it lacks "
            f"{' and '.join(missing)}"
        )
    about, info = read_info(folder)
    digests = mapping(about.get("sha256"))
    if changed := [name for name in _PROVED if digests.get(name) != sha256(folder / name)]:
        raise LlmWsaeError(
            f"in {folder}, {' and '.join(changed)} changed since it was saved (by the checksums in "
            f"{INFO}); {WAY_OUT}, or, if SAELens was meant to write there, remove {INFO} and "
            f"{EXTRAS} to load it as a SAELens dictionary"
        )
    cfg = mapping(read_json(folder / CFG, "configuration"))
    with naming(folder / CFG):
        kind, skip = kind_of(cfg.get("architecture"), Site.parse(info.site).is_mlp)
        sparsity = sparsity_of(kind, cfg.get("k"))
    weights, extras = read_tensors(folder / WEIGHTS), read_tensors(folder / EXTRAS)
    wanted = {"W_enc", "W_dec", "b_enc", "b_dec"}
    if sparsity.has_threshold:
        wanted.add("threshold")
    if skip:
        wanted.add("W_skip")
    if weights.keys() != wanted:
        found = f"{sorted(weights)} instead of {sorted(wanted)}"
        raise LlmWsaeError(f"{folder / WEIGHTS} holds {found}")
    if _described(folder).get("sha256") != digests:
        raise LlmWsaeError(f"{folder} was replaced while it was read; try again")
    return Content(weights, sparsity, info, extras, digests[WEIGHTS])


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Begin an error about the content of a file with its path."""
    try:
        yield
    except LlmWsaeError as error:
        raise LlmWsaeError(f"{path}: {error}") from None


def read_info(folder: Path) -> tuple[dict[str, Any], DictionaryInfo]:
    """The content of ``wsae.json``, proved, and the part that says how the dictionary was made.
    Raises LlmWsaeError if it is not one that this version wrote."""
    path = folder / INFO
    about = read_own_json(path, _INFO, WAY_OUT)
    if (about.get("format"), about.get("format_version")) != (_FORMAT, _FORMAT_VERSION):
        raise LlmWsaeError(
            f"{path} is not the information file of a dictionary as this version writes it (format "
            f"version {_FORMAT_VERSION}, not {shown(about.get('format_version'))}); update llm-wsae"
        )
    with naming(path):
        return about, DictionaryInfo.from_dict(about)


def read_facts(folder: Path, sae_id: str) -> Facts:
    """What the small files of a dictionary of this package say; nothing is proved. Raises
    LlmWsaeError if they cannot be read."""
    cfg = read_json(folder / CFG, "configuration") if (folder / CFG).is_file() else {}
    info = read_json(folder / INFO, _INFO)
    with naming(folder / INFO):
        return Facts.own(sae_id, cfg, info)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises LlmWsaeError if one cannot be used."""
    tensors, _ = load_tensors(path, "file of tensors")
    check_finite(tensors, str(path))
    return tensors


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises LlmWsaeError, which begins with ``where``, for whole numbers, NaN and infinity."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise LlmWsaeError(f"{where}: {name} is stored as {tensor.dtype}")
        # Piece by piece: on a whole tensor, torch would allocate a second one.
        pieces = tensor.detach().reshape(-1).split(_PIECE)
        if bad := sum(len(piece) - int(torch.isfinite(piece).sum()) for piece in pieces):
            raise LlmWsaeError(f"{where}: {name} holds {bad} NaN or infinite numbers")


def check_keeps_measurements(folder: Path, weights: str | None = None) -> None:
    """Raises UsageError for another tool's folder, and for links, which lead into the Hub's cache;
    LlmWsaeError if ``weights``, the SHA-256 of those measured, are no longer the folder's."""
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


def keep_measurements(
    folder: Path,
    found: _Groups | Callable[[Mapping[str, Any]], _Groups],
    weights: str | None = None,
) -> None:
    """Store groups of measurements (``fidelity``, ``monosemanticity``; JSON values) in the metrics
    of a dictionary's folder, replacing older ones of the same group; ``found`` may make them from
    the metrics there. ``weights`` is ``Dictionary.weights_sha256`` of what was measured. Raises as
    ``check_keeps_measurements`` does, and LlmWsaeError if the file cannot be read or written."""
    with writing(folder):
        check_keeps_measurements(folder, weights)
        about = read_own_json(folder / INFO, _INFO, WAY_OUT)
        old = mapping(about.get("metrics"))
        new = found(old) if callable(found) else found
        write_json(folder / INFO, {**about, "metrics": {**old, **new}})
