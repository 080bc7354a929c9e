"""Dictionaries are read from the Hugging Face Hub: copied into a folder, opened, listed.

A pull downloads into the client's cache, checks everything there, and only then copies into the
user's folder. A dictionary of the user's own is never replaced, and what was said of its latents
here, which may have been paid for, is never lost.
"""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
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
    weights_checksum,
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
    older one, as it was pulled from the same repository, is replaced in one step, with what was
    measured of it. If nothing but what was said or measured of it is new, that is added. Nothing
    else there is changed. ``pull.json`` in ``out`` keeps where each came from. Returns the
    folders by name.

    Raises UsageError for names that do not exist, LlmWsaeError if the Hub fails, if a file is
    damaged, unsafe or not what its checksum says, if two dictionaries would be copied into one
    place, or if ``out`` cannot be written or holds another dictionary there, or explanations of
    older weights that were made here.
    """
    out = Path(out)
    check_file(out / RECORD, is_record_of("pull"))
    repository = Repository.open(repo_id, revision)
    places = _places(repository, repository.wanted(sae_id), out)
    asked = {"repo_id": repo_id, "sae_id": sae_id, "revision": revision}

    def record(place: str, said: Any, *digests: Any) -> None:
        own = {"repo_id": repo_id, "sha256": digests, "explanations_sha256": said}
        write_record(out / RECORD, "pull", {**asked, "pulled": {**_pulled(out), place: own}})

    for name, place in places.items():
        with _own_layout(repository, name) as source, folder_lock(out, "pulled dictionaries"):
            folder, digests = out / place, _digests(source)
            clear_up(folder)
            recorded = _pulled(out).get(place)
            _check_ours(folder, recorded, repo_id, digests)
            _check_explanations(folder, recorded, weights_checksum(source))
            known = mapping(recorded).get("explanations_sha256")
            none_made_here = _explanations(folder) in (None, known, _explanations(source))
            if not (is_dictionary(folder) and _digests(folder) == digests and _is_intact(folder)):
                here = [_digests(folder)] if is_dictionary(folder) else []
                record(place, known, digests, *here)  # if it is killed, one of them is there
                copy_folder(source, folder)
            _add_what_is_new(source, folder)
            record(place, _explanations(folder) if none_made_here else known, digests)
    return {name: out / place for name, place in places.items()}


@contextmanager
def _own_layout(repository: Repository, name: str) -> Iterator[Path]:
    """The folder of a dictionary in the cache; a foreign one is converted, into another folder."""
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


def _digests(folder: Path) -> Any:
    """The SHA-256 of a dictionary's files, as its description holds them."""
    return read_json(folder / INFO, "dictionary's information").get("sha256")


def _check_ours(folder: Path, recorded: Any, repo_id: str, digests: Any) -> None:
    """Raises LlmWsaeError for a dictionary that is neither that of these digests nor as it was
    pulled from the repository; the record of a pull that broke off has the digests of both that may
    be there, the older and the newer one."""
    if not is_dictionary(folder):
        return
    here, known = _digests(folder), mapping(recorded)
    pulled = known.get("sha256")
    pulled = pulled if isinstance(pulled, list) else [pulled]
    ours = here is not None and known.get("repo_id") == repo_id and here in pulled
    if not ours and here != digests:
        raise LlmWsaeError(
            f"{folder} holds a dictionary that was not pulled from {repo_id}, or was saved again "
            "since; choose another --out"
        )


def _explanations(folder: Path) -> str | None:
    """The SHA-256 of what was said of a dictionary's latents, if anything was."""
    path = folder / EXPLANATIONS
    return sha256(path) if path.is_file() else None


def _check_explanations(folder: Path, recorded: Any, weights: Any) -> None:
    """Raises LlmWsaeError if a dictionary of other weights would be replaced, and with it
    explanations that no pull brought: they may have been paid for, unlike measurements."""
    if not is_dictionary(folder) or weights_checksum(folder) == weights:
        return
    if _explanations(folder) not in (None, mapping(recorded).get("explanations_sha256")):
        raise LlmWsaeError(
            f"{folder / EXPLANATIONS} explains the weights that were pulled before, and the "
            "repository has others now; move it away to replace them, or choose another --out"
        )


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


def _place(repo_id: str, name: str) -> str:
    """Where a dictionary goes, below ``out``."""
    return repo_id.split("/")[-1] if name == "." else name


def _places(repository: Repository, names: Sequence[str], out: Path) -> dict[str, str]:
    """Where each dictionary goes, below ``out``.

    Raises LlmWsaeError, before anything is downloaded, if one would be in the place of another, or
    of the record of the command, or a place holds something that was not pulled from there.
    """
    repo_id, pulled = repository.repo_id, _pulled(out)
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
        if not (out / place).resolve().is_relative_to(out.resolve()):
            raise LlmWsaeError(
                f"{out / place} leads out of {out} through a link, so nothing is put there; choose "
                "another --out"
            )
        check_replaceable(out / place)
        own = repository.layouts[name] is None
        digests = repository.read_json(inside(name, INFO)).get("sha256") if own else None
        _check_ours(out / place, pulled.get(place), repo_id, digests)
        if own:  # of a foreign one it is known when it is converted
            _check_explanations(out / place, pulled.get(place), mapping(digests).get(WEIGHTS))
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
