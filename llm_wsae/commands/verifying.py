"""Checking every byte of what this package wrote.

Files that a record lists are compared with it; every other file of this package has its own digest.
One of another tool, which has none, is only read, and named in the answer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from llm_wsae.artifact.artifact import FileRecord
from llm_wsae.artifact.files import (
    AGAIN,
    has_digest,
    open_tensors,
    own_facts,
    read_json,
    read_own_json,
)
from llm_wsae.data.store import MANIFEST, MEASUREMENTS, Manifest, complete_shards, store_in
from llm_wsae.dictionary.circuit_tracer import transcoder_set_in
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import read_explanations
from llm_wsae.dictionary.folder import (
    CFG,
    EXPLANATIONS,
    EXTRAS,
    INFO,
    WAY_OUT,
    WEIGHTS,
    read_folder,
)
from llm_wsae.dictionary.formats.reading import is_own, layout_of
from llm_wsae.errors import LlmWsaeError
from llm_wsae.lab.studies.report import BASIS, read_results, study_in
from llm_wsae.pages.neuronpedia import export_in
from llm_wsae.training.checkpoint import CHECKPOINT, LOG, check_beginning, training_in
from llm_wsae.weights.loss_weights import LossWeights

T = TypeVar("T")
_MAKERS = (store_in, training_in, study_in, export_in, transcoder_set_in)
_ARTIFACTS = {make(Path()).name: make for make in _MAKERS}
# files whose digests are in another file, or that only their folder explains
_OF_FOLDERS = {CFG, WEIGHTS, EXTRAS, EXPLANATIONS, LOG, CHECKPOINT}
_MEND = "delete the damaged files and run the same harvest again, which rewrites those missing"


@dataclass
class Found:
    """What a check found."""

    checks: int = 0
    problems: list[str] = field(default_factory=list)  # sentences, which also say what to do
    without_digest: list[Path] = field(default_factory=list)

    def check(self, work: Callable[[], T]) -> T | None:
        """What the work gives; None if it fails, which is one more problem."""
        self.checks += 1
        try:
            return work()
        except LlmWsaeError as error:
            self.problems.append(str(error))
            return None

    def compare(self, folder: Path, files: Mapping[str, FileRecord], way_out: str) -> set[Path]:
        """Compare the files of a folder with their records; their paths."""
        self.checks += 1
        names = tqdm(files, desc=folder.name, unit="file", dynamic_ncols=True, delay=1.0)
        problems = [files[name].problem(folder / name) for name in names]
        if any(problems):
            self.problems += [*filter(None, problems), way_out]
        return {folder / name for name in files}


def verify(path: Path | str, site: str | None = None) -> Found:
    """Check a folder, with the folders in it, a weights file, or the JSON record of a command.
    ``site`` is that of another tool's dictionary that does not name it. Raises LlmWsaeError if
    there is nothing that this package knows."""
    path, found = Path(path), Found()
    if not path.exists():
        raise LlmWsaeError(f"there is no file or folder {path}")
    if path.is_dir():
        _check_folder(found, path, site)
    else:
        _check_file(found, path)
    if not found.checks:
        raise LlmWsaeError(
            f"there is nothing in {path} that verify knows; give it the folder of a store, a "
            "dictionary, a training, a run, a study or an export, a weights file (.safetensors) or "
            "a record (.json)"
        )
    return found


def _check_file(found: Found, path: Path) -> None:
    stores = [one for one in path.parents[:2] if (one / MANIFEST).is_file()]
    if path.name in _OF_FOLDERS or (stores and path.suffix == ".safetensors"):
        folder = stores[0] if stores else path.parent
        raise LlmWsaeError(f"{path} is checked together with its folder; give {folder}")
    if path.suffix == ".json":
        _check_json(found, path)
    elif path.suffix == ".safetensors":
        _check_tensors(found, path)
        if found.without_digest and not found.problems:
            found.check(lambda: LossWeights.load(path))


def _check_folder(
    found: Found, folder: Path, site: str | None = None, listed: frozenset[Path] = frozenset()
) -> None:
    """The files in a folder and in the folders below, but those that were ``listed``."""
    entries = [path for path in sorted(folder.iterdir()) if path.name[0] != "."]
    names = {path.name for path in entries}
    layout = layout_of(names)
    if is_own(names) and site is None:
        if found.check(lambda: read_folder(folder)):
            found.check(lambda: read_explanations(folder))
        return
    if CFG in names or layout:  # of another tool
        if found.check(lambda: Dictionary.load(folder, site=site)) and layout:
            found.without_digest += [folder / name for name in layout.files]
        return
    for path in entries:
        if path.suffix == ".json":
            listed |= _check_json(found, path)
    for path in entries:
        if path.is_dir():
            if MANIFEST not in names or path.name == MEASUREMENTS:  # a store's others were listed
                _check_folder(found, path, listed=listed)
        elif path.suffix == ".safetensors" and path not in listed:
            facts = _check_tensors(found, path)
            if path.name == CHECKPOINT and facts and facts["log"] and LOG in names:
                record = FileRecord(**facts["log"])  # as far as the checkpoint reaches
                found.check(lambda: check_beginning(folder / LOG, record))  # noqa: B023
    if BASIS in names and not found.problems:
        found.check(lambda: read_results(folder))


def _check_json(found: Found, path: Path) -> set[Path]:
    """Check a JSON file, and the files that it lists if it is the record of a folder."""
    folder, name = path.parent, path.name
    if name in _ARTIFACTS:
        if record := found.check(_ARTIFACTS[name](folder).read):
            if name == MANIFEST:
                return _check_store(found, folder)
            way_out = f"restore it from a copy, or delete {path} and run the same command again"
            return found.compare(folder, record.files, way_out)
    elif name == INFO:
        found.check(lambda: read_own_json(path, "dictionary's information", WAY_OUT))
    elif has_digest(path):
        found.check(lambda: read_own_json(path, "record"))
    elif found.check(lambda: read_json(path, "record")) is not None:
        found.without_digest.append(path)
    return set()


def _check_store(found: Found, folder: Path) -> set[Path]:
    manifest = Manifest.load(folder)
    shards = (found.check(lambda: complete_shards(folder, manifest)) or {}).values()
    if not manifest.complete:
        there = sum(shard.contexts for shard in shards)
        found.problems.append(
            f"the harvest is not complete: {there} of {manifest.num_contexts} contexts are there; "
            "run the same harvest again to resume it"
        )
    files = dict(manifest.statistics)
    for shard in shards:
        files |= shard.files
    return found.compare(folder, files, _MEND)


def _check_tensors(found: Found, path: Path) -> dict[str, Any] | None:
    """Check a file that has a digest of its own; its facts."""

    def read() -> dict[str, Any] | None:
        with open_tensors(path, "file of tensors", AGAIN) as file:
            facts = own_facts(file, path, "file of tensors")
            is_of_weights = "gamma" in file.keys()  # noqa: SIM118 - no mapping
        if facts is None:
            found.without_digest.append(path)
        if is_of_weights:
            LossWeights.load(path)
        return facts

    return found.check(read)
