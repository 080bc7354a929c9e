"""Checking every byte of what this package wrote: stores, dictionaries, trainings, studies,
weights files.

Every file is compared with its digest. One of another tool, which has none, is only read, and named
in the answer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from llm_wsae.artifact.files import AGAIN, has_digest, open_tensors, own_facts, read_own_json
from llm_wsae.data.manifest import MANIFEST, Manifest, complete_shards
from llm_wsae.data.packing import load_contexts
from llm_wsae.data.shard_record import tokens_path
from llm_wsae.data.stored_measurement import MEASUREMENTS
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import read_explanations
from llm_wsae.dictionary.folder import (
    CFG,
    EXPLANATIONS,
    EXTRAS,
    INFO,
    OWN_DIGEST,
    WAY_OUT,
    WEIGHTS,
    check_folder,
    is_dictionary,
    weights_checksum,
)
from llm_wsae.dictionary.formats.reading import is_own, layout_of
from llm_wsae.dictionary.hub.pulling import RECORD as PULLED
from llm_wsae.errors import LlmWsaeError
from llm_wsae.lab.studies.folder import BASIS, read_basis, read_results
from llm_wsae.lab.studies.jobs import GROUP
from llm_wsae.training.checkpoint import CHECKPOINT, FINISHED, log_at_checkpoint, read_finished
from llm_wsae.training.log import LOG, Written
from llm_wsae.weights.loss_weights import LossWeights, is_weights_file

T = TypeVar("T")
_OF_RUN = (MANIFEST, FINISHED, CHECKPOINT)
"""Of the folders in that of a run: its store, or the training of a site."""
_OF_FOLDERS = {CFG, WEIGHTS, EXTRAS, EXPLANATIONS, LOG, CHECKPOINT}
"""Files whose digests are in another file, or that only their folder explains."""
_SHORT = 1.0  # seconds of work that need no bar


@dataclass
class Found:
    """What a check found."""

    kind: str
    """``store``, ``dictionary``, ``training``, ``study``, ``run``, ``record``, ``weights file`` or
    ``folder of pulled dictionaries``."""
    advance: Callable[[int], object] = field(default=lambda size: None, repr=False)
    """Told the bytes of every file that was checked."""
    problems: list[str] = field(default_factory=list)
    """A sentence for each fault, which also says what to do."""
    without_digest: list[Path] = field(default_factory=list)
    """Files that have none."""
    damaged: set[Path] = field(default_factory=set)
    """Files that a problem names."""

    def check(self, path: Path, work: Callable[[], T]) -> T | None:
        """What the work gives; None if it fails, which is one more problem, of that path."""
        try:
            return work()
        except LlmWsaeError as error:
            self.problems.append(str(error))
            self.damaged.add(path)
            return None


def verify(path: Path | str, site: str | None = None) -> Found:
    """Check a folder, with the folders in it, a weights file, or the JSON record of a command.

    ``site`` is that of another tool's dictionary that does not name it. Raises LlmWsaeError if
    there is nothing that this package knows.
    """
    path = Path(path)
    if path.is_file():
        names, kind = set(), _kind_of_file(path)
    elif path.is_dir():
        names = {entry.name for entry in path.iterdir()}
        kind = _kind(path, names)
    else:
        raise LlmWsaeError(f"there is no file or folder {path}")
    with _progress(_size_of(path)) as bar:
        found = Found(kind, advance=bar.update)
        if kind == "weights file":
            _check_tensors(found, path)
            if not found.problems and not is_weights_file(path):
                found.check(path, lambda: LossWeights.load(path))
        elif kind == "record":
            _check_json(found, path)
        elif kind == "dictionary":
            _check_dictionary(found, path, names, site)
        else:
            _check_folder(found, path)
        bar.update(bar.total - bar.n)  # figures, pages and logs are not counted one by one
    return found


def _progress(size: int) -> tqdm:
    return tqdm(
        total=size, desc="verify", unit="B", unit_scale=True, dynamic_ncols=True, delay=_SHORT
    )


def _size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a folder and in those below."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def _kind_of_file(path: Path) -> str:
    stores = [one for one in (path.parent, path.parent.parent) if (one / MANIFEST).is_file()]
    if path.name in _OF_FOLDERS or (stores and path.suffix == ".safetensors"):
        folder = stores[0] if stores else path.parent
        raise LlmWsaeError(f"{path} is checked together with its folder; give {folder}")
    if path.suffix not in (".json", ".safetensors"):
        raise LlmWsaeError(
            f"there is nothing in {path} that verify knows; give it a folder, a weights file "
            "(.safetensors) or a record (.json)"
        )
    return "record" if path.suffix == ".json" else "weights file"


def _kind(folder: Path, names: set[str]) -> str:
    if MANIFEST in names:
        return "store"
    if is_own(names) or CFG in names or layout_of(names):
        return "dictionary"
    if BASIS in names:
        return "study"
    if names & {FINISHED, CHECKPOINT}:
        return "training"
    if any((folder / name / own).is_file() for name in names for own in _OF_RUN):
        return "run"
    if PULLED in names:
        return "folder of pulled dictionaries"
    raise LlmWsaeError(
        f"{folder} is not a store (with a {MANIFEST}), a dictionary (with a {CFG}), a training "
        f"(with a {FINISHED} or {CHECKPOINT}), a study (with a {BASIS}), "
        f"pulled dictionaries (with a {PULLED}) or the folder of a run"
    )


def _check_folder(found: Found, folder: Path) -> None:
    """Check the files in a folder and in the folders below, each for what it is."""
    names = {entry.name for entry in folder.iterdir()}
    if is_own(names):
        _check_dictionary(found, folder, names, None)
        return
    if MANIFEST in names:
        found.problems += found.check(folder, lambda: _check_store(folder, found.advance)) or []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            of_store = MANIFEST in names and entry.name != MEASUREMENTS  # checked as listed there
            if not of_store and not entry.name.startswith("."):
                _check_folder(found, entry)
        elif entry.suffix == ".json" and entry.name != MANIFEST:
            _check_json(found, entry)
        elif entry.suffix == ".safetensors":
            _check_tensors(found, entry)
    if names & {FINISHED, CHECKPOINT}:
        _check_training(found, folder, names)
    if BASIS in names and not any(path.is_relative_to(folder) for path in found.damaged):
        found.check(folder, lambda: (read_basis(folder), read_results(folder)))


def _check_json(found: Found, path: Path) -> None:
    found.advance(_size_of(path))
    if not has_digest(path):
        found.without_digest.append(path)
    elif path.name == INFO:
        what = "dictionary's information"
        found.check(path, lambda: read_own_json(path, what, WAY_OUT, key=OWN_DIGEST))
    else:
        found.check(path, lambda: read_own_json(path, "record"))


def _check_tensors(found: Found, path: Path) -> None:
    def read() -> None:
        with open_tensors(path, "file of tensors", AGAIN) as file:
            if own_facts(file, path, "file of tensors") is None:
                found.without_digest.append(path)

    found.advance(_size_of(path))
    found.check(path, read)
    if path not in found.damaged and is_weights_file(path):
        found.check(path, lambda: LossWeights.load(path))


def _check_dictionary(found: Found, folder: Path, names: set[str], site: str | None) -> None:
    if is_own(names) and site is None:
        if found.check(folder, lambda: check_folder(folder)):
            found.check(folder, lambda: read_explanations(folder))
    elif found.check(folder, lambda: Dictionary.load(folder, site=site)):
        layout = layout_of(names)
        found.without_digest += [folder / name for name in layout.files] if layout else []
    found.advance(_size_of(folder))


def _check_training(found: Found, folder: Path, names: set[str]) -> None:
    """The log, and whether every dictionary of a finished training is there."""
    written: Written | None = None
    if FINISHED in names:
        if folder / FINISHED in found.damaged:
            return
        finished = found.check(folder / FINISHED, lambda: read_finished(folder))
        if finished is None:
            return
        written = finished.log
        for name in finished.settings["arms"] if GROUP not in names else []:
            there, known = is_dictionary(folder / name), finished.weights.get(name)
            if not there or known != weights_checksum(folder / name):
                found.problems.append(
                    f"{folder / name} {'is not what was trained' if there else 'is missing'}; "
                    f"delete {folder / FINISHED} and run the same command again"
                )
    elif folder / CHECKPOINT not in found.damaged:
        written = found.check(folder / CHECKPOINT, lambda: log_at_checkpoint(folder))
    if written is None or LOG not in names:
        return
    if problem := written.problem(folder / LOG, whole=FINISHED in names):
        found.problems.append(problem)


def verify_store(folder: Path | str) -> list[str]:
    """Read a store once and return a sentence for each fault, and one that says what to do.

    Finds missing, truncated and changed files, and keep-masks that do not match the rows. Files are
    read piece by piece, so memory use does not depend on the size of the store. Raises LlmWsaeError
    if there is no store or its manifest is damaged.
    """
    folder = Path(folder)
    with _progress(_size_of(folder)) as bar:
        return _check_store(folder, bar.update)


def _check_store(folder: Path, advance: Callable[[int], object]) -> list[str]:
    manifest = Manifest.load(folder)
    shards = complete_shards(folder, manifest)
    problems, damage = [], {}
    if not manifest.complete:
        there = sum(shard.contexts for shard in shards.values())
        problems.append(
            f"the harvest is not complete: {there} of {manifest.num_contexts} contexts are there; "
            "run the same harvest again to resume it"
        )
    files = {**manifest.statistics, **{p: f for s in shards.values() for p, f in s.files.items()}}
    for name, record in files.items():
        if problem := record.problem(folder / name):
            damage[name] = problem
        advance(record.bytes)
    for index, shard in shards.items():
        name = tokens_path(index)
        if name in damage:  # then anything may be in it
            continue
        contexts = load_contexts(folder / name, shard.first, shard.next)
        kept = int(contexts.keep.sum())
        if (len(contexts.ids), kept) != (shard.contexts, shard.rows):
            damage[name] = (
                f"{folder / name} holds {len(contexts.ids)} contexts with {kept} rows, but the "
                f"manifest says {shard.contexts} with {shard.rows}"
            )
    problems += damage.values()
    if damage:
        problems.append(
            "delete the damaged files and run the same harvest again, which rewrites those missing"
        )
    return problems
