"""Dictionaries are read from the Hugging Face Hub: copied into a folder, opened, listed.

A pull downloads into the client's cache, checks everything there, and only then copies into the
user's folder. A dictionary of the user's own is never replaced, and what was said of its latents
here, which may have been paid for, is never lost.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from llm_wsae.artifact.files import folder_lock, read_json, sha256
from llm_wsae.artifact.outputs import check_file, is_record_of
from llm_wsae.artifact.provenance import write_record
from llm_wsae.dictionary.atomic_folder import clear_up
from llm_wsae.dictionary.explanations import keep_explanations, read_explanations
from llm_wsae.dictionary.folder import (
    CFG,
    EXPLANATIONS,
    INFO,
    WEIGHTS,
    check_folder,
    check_replaceable,
    copy_folder,
    is_dictionary,
    keep_measurements,
    write_folder,
)
from llm_wsae.dictionary.formats import reading
from llm_wsae.dictionary.hub.card_data import Facts, facts
from llm_wsae.dictionary.hub.repository import Repository, inside
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.model.site import Site
from llm_wsae.outside import mapping

RECORD = "pull.json"
"""The record of the command, next to the dictionaries."""


def pull(
    repo_id: str, out: Path, sae_id: str | None = None, *, revision: str | None = None
) -> dict[str, Path]:
    """Copy one dictionary of a repository, or all of them, to ``out/<site>/<name>``.

    (One at the top level of its repository goes to ``out/<repository>``.) Each is downloaded and
    checked completely before it is copied; a foreign one is converted to this package's layout. An
    older one, as it was pulled from the same repository, is replaced in one step. If nothing but
    what was said or measured of it is new, that is added. ``pull.json`` in ``out`` keeps where each
    came from. Returns the folders by name.

    Raises UsageError for names that do not exist, LlmWsaeError if the Hub fails, if a file is
    damaged, unsafe or not what its checksum says, if two dictionaries would be copied into one
    place, or if ``out`` cannot be written, or holds another dictionary there or explanations of
    older weights that were made here.
    """
    out = Path(out)
    check_file(out / RECORD, is_record_of("pull"))
    repository = Repository.open(repo_id, revision)
    places = _places(repository, repository.wanted(sae_id), out)
    asked = {"repo_id": repo_id, "sae_id": sae_id, "revision": revision}
    for name, place in places.items():
        with _own_layout(repository, name) as source, folder_lock(out, "pulled dictionaries"):
            pulled = _pulled(out)
            known = mapping(pulled.get(place))
            ours = known.get("states") if known.get("repo_id") == repo_id else None

            def record(states: list[Any], place: str = place, pulled: Any = pulled) -> None:
                pulled[place] = {"repo_id": repo_id, "states": states}
                write_record(out / RECORD, "pull", {**asked, "pulled": pulled})

            _update(source, out / place, ours if isinstance(ours, list) else [], record)
    return {name: out / place for name, place in places.items()}


def _update(
    source: Path, folder: Path, ours: list[Any], record: Callable[[list[Any]], None]
) -> None:
    """Make the folder hold the dictionary of ``source``, if it is in one of the states in which a
    pull left it (``ours``) or holds that dictionary already."""
    clear_up(folder)
    here, there = _state(folder), _state(source)
    same = here["files"] == there["files"]
    kept = [one for one in map(mapping, ours) if one.get("files") == here["files"]]
    if here["files"] and not same:
        if not kept:
            raise LlmWsaeError(
                f"{folder} holds a dictionary that was not pulled from this repository, or was "
                "saved again since; choose another --out"
            )
        own = here["explanations"] and here not in ours
        if own and here["files"].get(WEIGHTS) != there["files"].get(WEIGHTS):
            raise LlmWsaeError(
                f"{folder / EXPLANATIONS} explains the weights that were pulled before, and the "
                "repository has others now; move it away to replace them, or choose another --out"
            )
    if not (same and _is_intact(folder)):
        record([there, *kept])  # if it is killed, one of them is there
        copy_folder(source, folder)
    _add_what_is_new(source, folder)
    if here["explanations"] in (None, there["explanations"]) or here in ours:
        record([_state(folder)])


def _state(folder: Path) -> dict[str, Any]:
    """The SHA-256 of a dictionary's files, as its description holds them, and of what was said of
    its latents; empty if there is no dictionary."""
    if not is_dictionary(folder):
        return {"files": {}, "explanations": None}
    info = read_json(folder / INFO, "dictionary's information")
    said = folder / EXPLANATIONS
    digest = sha256(said) if said.is_file() else None
    return {"files": mapping(info.get("sha256")), "explanations": digest}


@contextmanager
def _own_layout(repository: Repository, name: str) -> Iterator[Path]:
    """The folder of a dictionary in the cache, checked; a foreign one is converted, into another
    folder."""
    source = repository.dictionary_folder(name)
    if repository.layouts[name] is None:
        Site.parse(check_folder(source).site)
        yield source
        return
    read = reading.read(source)
    with tempfile.TemporaryDirectory() as place:
        converted = Path(place) / "converted"
        write_folder(converted, read.weights, read.sparsity, read.info, read.extras)
        yield converted


def _pulled(out: Path) -> dict[str, Any]:
    """What is recorded of every dictionary that was pulled into a folder, by its place there."""
    if not (out / RECORD).is_file():
        return {}
    config = mapping(mapping(read_json(out / RECORD, "record")).get("config"))
    return dict(mapping(config.get("pulled")))


def _is_intact(folder: Path) -> bool:
    try:
        check_folder(folder)
    except LlmWsaeError:
        return False
    return True


def _add_what_is_new(source: Path, folder: Path) -> None:
    """Add what its repository says and measured of a dictionary to what is known of it here."""
    here, there = read_explanations(folder), read_explanations(source)
    if new := [one for latent, one in there.items() if latent not in here]:
        keep_explanations(folder, new)
    known, found = check_folder(folder).metrics, check_folder(source).metrics
    if groups := {group: own for group, own in found.items() if group not in known}:
        keep_measurements(folder, groups)


def _places(repository: Repository, names: Sequence[str], out: Path) -> dict[str, str]:
    """Where each dictionary goes, below ``out``.

    Raises LlmWsaeError, before any is downloaded, if one would be in the place of another or of the
    record (whatever the case of the letters), or outside of ``out``.
    """
    places: dict[str, str] = {}
    taken = {PurePosixPath(RECORD): f"the record {RECORD}"}
    for name in names:
        place = repository.repo_id.split("/")[-1] if name == "." else name
        here = PurePosixPath(place.casefold())
        for other, holder in taken.items():
            if here.is_relative_to(other) or other.is_relative_to(here):
                raise LlmWsaeError(
                    f"{name} of {repository.repo_id} would be copied into the place of {holder}; "
                    "pull one dictionary at a time, each into a folder of its own: llm-wsae pull "
                    f"{repository.repo_id} {name} --out …"
                )
        if not (out / place).resolve().is_relative_to(out.resolve()):
            raise LlmWsaeError(
                f"{out / place} leads out of {out} through a link, so nothing is put there; choose "
                "another --out"
            )
        check_replaceable(out / place)
        taken[here], places[name] = name, place
    return places


def fetch(repo_id: str, sae_id: str | None = None, *, revision: str | None = None) -> Path:
    """The folder in the local cache with one dictionary, or the only one, of a repository.

    ``reading.read`` judges its content. Raises as ``pull`` does.
    """
    repository = Repository.open(repo_id, revision)
    names = repository.wanted(sae_id)
    if len(names) > 1:
        raise UsageError(
            f"{repo_id} holds {len(names)} dictionaries, so name one; {nearest('', names)}"
        )
    return repository.dictionary_folder(names[0])


def list_dictionaries(repo_id: str, *, revision: str | None = None) -> list[Facts]:
    """What is known of every dictionary in a repository; no tensors are downloaded.

    Raises UsageError for names that do not exist, LlmWsaeError if the Hub fails or a file is
    damaged.
    """
    repository = Repository.open(repo_id, revision)
    return [remote_facts(repository, sae_id) for sae_id in repository.wanted(None)]


def remote_facts(repository: Repository, sae_id: str) -> Facts:
    """What the small files of a dictionary say. Raises as ``list_dictionaries`` does."""
    if layout := repository.layouts[sae_id]:
        said = repository.announced(sae_id, layout)
        info = reading.info_of(layout, said, said.site or "", PurePosixPath(sae_id).name)
        return facts(sae_id, dataclasses.asdict(said), info.to_dict())
    cfg = inside(sae_id, CFG)
    return facts(
        sae_id,
        repository.read_json(cfg) if cfg in repository.files else {},
        repository.read_json(inside(sae_id, INFO)),
    )
