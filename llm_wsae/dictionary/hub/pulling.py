"""Dictionaries are read from the Hugging Face Hub: copied into a folder, opened, listed.

A pull downloads into the client's cache, checks everything there, and only then copies into the
user's folder. A dictionary of the user's own is never replaced.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from llm_wsae.dictionary.explanations import keep_explanations, read_explanations
from llm_wsae.dictionary.folder import (
    CFG,
    INFO,
    check_folder,
    check_replaceable,
    copy_folder,
    is_dictionary,
    keep_measurements,
    weights_checksum,
    write_folder,
)
from llm_wsae.dictionary.formats import reading
from llm_wsae.dictionary.hub.card_data import Facts, facts
from llm_wsae.dictionary.hub.repository import Repository
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.files import read_json
from llm_wsae.model.site import Site
from llm_wsae.outputs import check_file, is_record_of
from llm_wsae.outside import mapping
from llm_wsae.provenance import write_record

RECORD = "pull.json"
"""The record of the command, next to the dictionaries."""


def pull(
    repo_id: str, out: Path, sae_id: str | None = None, *, revision: str | None = None
) -> dict[str, Path]:
    """Copy one dictionary of a repository, or all of them, to ``out/<site>/<name>``.

    (One at the top level of its repository goes to ``out/<repository>``.) Each is downloaded and
    checked completely before it is copied; a foreign one is converted to this package's layout. An
    older one that was pulled from the same repository is replaced in one step; if only what was
    said or measured of it is new, that is added. Anything else there is left alone. ``pull.json``
    in ``out`` keeps which repository each came from. Returns the folders by name.

    Raises UsageError for names that do not exist, LlmWsaeError if the Hub fails, if a file is
    damaged, unsafe or not what its checksum says, if two dictionaries would be copied into one
    place, or if ``out`` cannot be written.
    """
    out = Path(out)
    check_file(out / RECORD, is_record_of("pull"))
    repository = Repository.open(repo_id, revision)
    pulled = _pulled(out)
    places = _places(repo_id, repository.wanted(sae_id), out, pulled)
    folders = {name: out / place for name, place in places.items()}
    for name, folder in folders.items():
        source = repository.dictionary_folder(name)
        if repository.layouts[name] is not None:
            read = reading.read(source)
            write_folder(folder, read.weights, read.sparsity, read.info, read.extras)
        else:
            Site.parse(check_folder(source).site)
            if _is_the_same(source, folder):
                _add_what_is_new(source, folder)
            else:
                copy_folder(source, folder)
        pulled[places[name]] = repo_id
        asked = {"repo_id": repo_id, "sae_id": sae_id, "revision": revision}
        write_record(out / RECORD, "pull", {**asked, "pulled": pulled})
    return folders


def _pulled(out: Path) -> dict[str, str]:
    """Which repository each dictionary in a folder was pulled from, by its place there."""
    if not (out / RECORD).is_file():
        return {}
    config = mapping(mapping(read_json(out / RECORD, "record")).get("config"))
    repo_id, names = config.get("repo_id"), config.get("dictionaries")
    if isinstance(names, list):  # of an older version: those of the last pull
        return {_place(str(repo_id), str(name)): str(repo_id) for name in names}
    return {place: str(source) for place, source in mapping(config.get("pulled")).items()}


def _is_the_same(source: Path, folder: Path) -> bool:
    """Whether a folder holds a dictionary of the same weights, undamaged."""
    try:
        check_folder(folder)
    except LlmWsaeError:
        return False
    return bool(weights_checksum(source) == weights_checksum(folder))


def _add_what_is_new(source: Path, folder: Path) -> None:
    """Add what its repository says and measured of a dictionary to what is known of it here."""
    here, there = read_explanations(folder), read_explanations(source)
    if new := [one for latent, one in there.items() if latent not in here]:
        keep_explanations(folder, new)
    known, found = check_folder(folder).metrics, check_folder(source).metrics
    if groups := {group: own for group, own in found.items() if group not in known}:
        keep_measurements(folder, groups)


def _place(repo_id: str, name: str) -> str:
    """Where a dictionary goes, below ``out``."""
    return repo_id.split("/")[-1] if name == "." else name


def _places(
    repo_id: str, names: Sequence[str], out: Path, pulled: Mapping[str, str]
) -> dict[str, str]:
    """Where each dictionary goes, below ``out``.

    Raises LlmWsaeError, before anything is downloaded, if one would be in the place of another, or
    of the record of the command, or a place holds something that was not pulled from there.
    """
    places = {name: _place(repo_id, name) for name in names}
    taken = {RECORD: f"the record {RECORD}"}
    for name, place in sorted(places.items(), key=lambda item: item[1].count("/")):
        path = PurePosixPath(place.casefold())  # some disks do not tell A from a
        for above in (path, *path.parents):
            if other := taken.get(str(above)):
                raise LlmWsaeError(
                    f"{name} of {repo_id} would be copied into the place of {other}; pull one "
                    f"dictionary at a time, each into a folder of its own: llm-wsae pull {repo_id} "
                    f"{name} --out …"
                )
        taken[str(path)] = name
        check_replaceable(out / place)
        if is_dictionary(out / place) and pulled.get(place) != repo_id:
            raise LlmWsaeError(
                f"{out / place} holds a dictionary that was not pulled from {repo_id}, so it is "
                "left alone; choose another --out"
            )
    return places


def fetch(repo_id: str, sae_id: str | None = None, *, revision: str | None = None) -> Path:
    """The folder in the local cache with one dictionary, or the only one, of a repository.

    By their checksums the files are those that were saved; ``reading.read`` judges their content.
    Raises as ``pull`` does.
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
    prefix = "" if sae_id == "." else f"{sae_id}/"
    cfg = repository.read_json(prefix + CFG) if prefix + CFG in repository.files else {}
    return facts(sae_id, cfg, repository.read_json(prefix + INFO))
