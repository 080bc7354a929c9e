"""Dictionaries are put on the Hugging Face Hub (``push``) and read from it: copied into a folder
(``pull``), opened (``fetch``), listed.

A repository holds many dictionaries, each in the folder ``<site>/<name>``, and one card for all of
them. A push is a single commit of what changed, on top of the commit that it was compared with.
Large files are uploaded first and become visible only with the commit, so a push that breaks off
leaves the repository as it was; a new branch may be left, unchanged.

A pull downloads into the client's cache, checks everything there, and only then copies into the
user's folder. A dictionary of the user's own is never replaced, and what was said of its latents
here, which may have been paid for, is never lost.
"""

import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from llm_wsae.artifact.artifact import check_file, is_record_of
from llm_wsae.artifact.files import folder_lock, read_json
from llm_wsae.artifact.provenance import write_record
from llm_wsae.dictionary.explanations import keep_explanations, read_explanations
from llm_wsae.dictionary.folder import (
    CFG,
    EXPLANATIONS,
    INFO,
    WEIGHTS,
    check_replaceable,
    clear_up,
    copy_folder,
    is_dictionary,
    keep_measurements,
    read_folder,
    read_info,
    write_folder,
)
from llm_wsae.dictionary.formats import reading
from llm_wsae.dictionary.hub.card import card
from llm_wsae.dictionary.hub.repository import COMMIT, FILES, Repository, commit_of, hub_errors
from llm_wsae.dictionary.info import DictionaryInfo, Facts
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.outside import check_revision, mapping

_README = "README.md"
_SHOWN_ID = re.compile(r"[A-Za-z0-9_.+=/-]+")  # folders that a card can show unescaped
_UNSAFE = re.compile(r"[^A-Za-z0-9_.+=-]+")
RECORD = "pull.json"
"""The record of the command, next to the dictionaries."""


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    url: str
    """Address of the commit, or of the repository if nothing had changed."""
    commit: str
    """The commit that now holds the dictionaries."""
    sae_ids: list[str]
    """The dictionaries' folders in the repository."""
    changed: list[str]
    """Paths that were written; empty if nothing had changed."""


def push(
    folders: Sequence[Path],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,
) -> Pushed:
    """Put dictionary folders into a repository, which is created if it does not exist.

    ``private`` applies to a new repository; ``revision`` is a branch, begun at the head of ``main``
    if it is new; ``license`` is one of the Hub's identifiers, such as ``mit``, for the card. What
    others put there about the same weights stays: measurements and explanations that are not here.

    Raises UsageError for impossible requests (two dictionaries of one name, a name taken by another
    model's dictionary, a tag instead of a branch, ``private`` for a public repository, no such
    user), LlmWsaeError for a folder that is not a complete dictionary or changed since it was
    saved, and for every failure of the Hub.
    """
    check_revision(revision)
    local = _local_dictionaries(folders)
    with hub_errors(repo_id, revision):
        head, is_new = _prepare(repo_id, private, revision)
        remote = Repository.at(repo_id, revision, head)
    theirs = _their_facts(local, remote)
    with tempfile.TemporaryDirectory() as place:
        staged = {name: _staged(name, local[name], remote, Path(place)) for name in local}
        known = theirs | {name: _facts(name, folder) for name, folder in staged.items()}
        old = ""
        if _README in remote.files:
            old = remote.fetch(_README).read_text(encoding="utf-8", errors="replace")
        ordered = [known[name] for name in sorted(known)]
        new = card(repo_id, ordered, old=old, license=license, revision=revision)
        changed: dict[str, Path | bytes | None] = {} if new == old else {_README: new.encode()}
        for name, folder in staged.items():
            changed |= _changed(name, folder, remote)
        if not changed and not is_new:
            return Pushed(f"{constants.ENDPOINT}/{repo_id}", head, list(local), [])
        operations = [_operation(path, new) for path, new in sorted(changed.items())]
        with hub_errors(repo_id, revision):
            if is_new:
                HfApi().create_branch(repo_id, branch=str(revision), revision=head)
            added = [one for one in operations if isinstance(one, CommitOperationAdd)]
            HfApi().preupload_lfs_files(repo_id, added, revision=revision)
            # The client would silently leave these files out of the commit.
            if ignored := [one.path_in_repo for one in added if one._should_ignore]:
                raise LlmWsaeError(
                    f"{repo_id} has a .gitignore that excludes {', '.join(ignored)}, so nothing "
                    "was pushed; remove the entry, or push to another repository"
                )
            done = HfApi().create_commit(
                repo_id,
                operations,
                commit_message=f"Push {', '.join(local)}"[:72],
                revision=revision,
                parent_commit=head,
            )
            commit = commit_of(done.oid)
        return Pushed(str(done.commit_url), commit, list(local), sorted(changed))


def folder_name(info: DictionaryInfo) -> str:
    """``<site>/<name>``: the dictionary's folder in a repository, in harmless characters."""
    name = _UNSAFE.sub("-", info.name).strip("-.") or "dictionary"
    return f"{info.site}/{name}"


def _local_dictionaries(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by their names in the repository, each checked completely."""
    if not folders:
        raise UsageError("name at least one dictionary folder to push")
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        sae_id = folder_name(read_folder(folder).info)
        read_explanations(folder)  # raises for those of another dictionary
        if sae_id in found:
            raise UsageError(
                f"{found[sae_id]} and {folder} are both named {sae_id}; push only one of them, or "
                "use another repository"
            )
        found[sae_id] = folder
    return found


def _prepare(repo_id: str, private: bool, revision: str | None) -> tuple[str, bool]:
    """The commit to build on, and whether the branch is new. Creates a missing repository."""
    if repo_id.count("/") != 1:  # the Hub would make it under another name than it is found by
        raise UsageError(f"name the repository as user/name, not {repo_id!r}")
    api = HfApi()
    try:
        main = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private or None)
        main = api.model_info(repo_id)
    if private and main.private is not True:
        raise UsageError(
            f"{repo_id} exists and is public, so --private cannot hide what is pushed; choose "
            "another name, or make it private in its settings"
        )
    if revision is None:
        return commit_of(main.sha), False
    refs = api.list_repo_refs(repo_id)
    heads = {one.name: one.target_commit for one in refs.branches}
    if revision in heads:
        return commit_of(heads[revision]), False
    if COMMIT.fullmatch(revision) or revision in [one.name for one in refs.tags]:
        raise UsageError(
            f"{revision} is not a branch of {repo_id}, so nothing can be pushed to it; "
            f"{nearest('', heads)}"
        )
    return commit_of(main.sha), True


def _staged(sae_id: str, folder: Path, remote: Repository, place: Path) -> Path:
    """The folder, or, where others described the same weights, a copy below ``place`` that also
    holds what others measured and said; what is known here counts more."""
    weights, info, said = (f"{sae_id}/{name}" for name in (WEIGHTS, INFO, EXPLANATIONS))
    same = weights in remote.files and remote.files[weights].is_same_as(folder / WEIGHTS)
    if not same or info not in remote.files:
        return folder
    theirs = [remote.fetch(path).parent for path in (info, said) if path in remote.files]
    copy = place / sae_id
    copy_folder(folder, copy)
    with contextlib.suppress(LlmWsaeError):  # what is damaged there is replaced
        _add_what_is_new(theirs[0], copy)
    return copy


def _changed(sae_id: str, folder: Path, remote: Repository) -> dict[str, Path | bytes | None]:
    """The files of a dictionary that the repository lacks or has differently; None for one that
    must be deleted."""
    changed: dict[str, Path | bytes | None] = {}
    for name in (*FILES, EXPLANATIONS):
        path = f"{sae_id}/{name}"
        there = remote.files.get(path)
        if (folder / name).is_file() and not (there and there.is_same_as(folder / name)):
            changed[path] = folder / name
    said = f"{sae_id}/{EXPLANATIONS}"
    if said in remote.files and said not in changed and f"{sae_id}/{WEIGHTS}" in changed:
        changed[said] = None  # of the older weights
    return changed


def _operation(path: str, new: Path | bytes | None) -> CommitOperationAdd | CommitOperationDelete:
    return CommitOperationDelete(path) if new is None else CommitOperationAdd(path, new)


def _facts(sae_id: str, folder: Path) -> Facts:
    cfg = read_json(folder / CFG, "dictionary's configuration")
    return Facts.own(sae_id, cfg, read_json(folder / INFO, "dictionary's information"))


def _their_facts(local: Mapping[str, Path], remote: Repository) -> dict[str, Facts]:
    """The facts of the dictionaries in the repository that the card names.

    Raises UsageError if one of them is of another model and would be replaced.
    """
    known: dict[str, Facts] = {}
    for sae_id, layout in remote.layouts.items():
        if not _SHOWN_ID.fullmatch(sae_id) or (layout is not None and sae_id not in local):
            continue
        try:
            there = known[sae_id] = remote.facts(sae_id)
        except LlmWsaeError as error:  # a broken one must not stop the push
            if sae_id not in local:
                print(f"llm-wsae: the card omits {sae_id}: {error}", file=sys.stderr)
            continue
        mine = _facts(sae_id, local[sae_id]) if sae_id in local else there
        if mine.model and there.model and mine.model != there.model:
            raise UsageError(
                f"{remote.repo_id} holds another dictionary named {sae_id}, for the model "
                f"{there.model}, and {local[sae_id]} is for {mine.model}; push it to another "
                "repository"
            )
    return known


def pull(
    repo_id: str, out: Path, sae_id: str | None = None, *, revision: str | None = None
) -> dict[str, Path]:
    """Copy one dictionary of a repository, or all of them, to ``out/<site>/<name>`` (one at the top
    level of its repository to ``out/<repository>``). Returns the folders by name.

    Each is checked completely before it is copied; a foreign one is converted to this package's
    layout. An older one that was pulled from the same repository is replaced in one step. What was
    said or measured of one that is there is added. ``pull.json`` in ``out`` keeps where each came
    from.

    Raises UsageError for names that do not exist, LlmWsaeError if the Hub fails, if a file is
    damaged, unsafe or not what its checksum says, if two dictionaries would be copied into one
    place, or if ``out`` cannot be written, or holds another dictionary there or explanations of
    older weights.
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
            ours = known.get("versions") if known.get("repo_id") == repo_id else None
            ours = ours if isinstance(ours, list) else []
            if not _is_there(source, out / place, ours):
                new = _digests(source)
                versions = ours if new in ours else [*ours, new]
                pulled[place] = {"repo_id": repo_id, "versions": versions}
                write_record(out / RECORD, "pull", {**asked, "pulled": pulled})
                copy_folder(source, out / place)
            _add_what_is_new(source, out / place)
    return {name: out / place for name, place in places.items()}


def _is_there(source: Path, folder: Path, ours: list[Any]) -> bool:
    """Whether the folder holds the dictionary of ``source``; raises LlmWsaeError if it holds one
    that may not be replaced: only ``ours`` may, which were pulled from the same repository."""
    clear_up(folder)
    here, there = _digests(folder), _digests(source)
    if not here:
        return False
    if here == there:
        try:
            read_folder(folder)
        except LlmWsaeError:  # damaged since
            return False
        return True
    if here not in ours:
        raise LlmWsaeError(
            f"{folder} holds a dictionary that was not pulled from this repository, or was "
            "saved again since; choose another --out"
        )
    if (folder / EXPLANATIONS).is_file() and here.get(WEIGHTS) != there.get(WEIGHTS):
        raise LlmWsaeError(
            f"{folder / EXPLANATIONS} explains the weights that were pulled before, and the "
            "repository has others now; move it away to replace them, or choose another --out"
        )
    return False


def _digests(folder: Path) -> dict[str, Any]:
    """The SHA-256 of a dictionary's files, by its description; empty if there is none."""
    if not is_dictionary(folder):
        return {}
    return dict(mapping(read_json(folder / INFO, "dictionary's information").get("sha256")))


def _pulled(out: Path) -> dict[str, Any]:
    """What is recorded of every dictionary that was pulled into a folder, by its place there."""
    record = mapping(read_json(out / RECORD, "record")) if (out / RECORD).is_file() else {}
    return dict(mapping(mapping(record.get("config")).get("pulled")))


@contextmanager
def _own_layout(repository: Repository, name: str) -> Iterator[Path]:
    """The folder of a dictionary in the cache, checked; a foreign one is converted, into another
    folder."""
    source = repository.dictionary_folder(name)
    read = reading.read(source)
    if repository.layouts[name] is None:
        yield source
        return
    with tempfile.TemporaryDirectory() as place:
        converted = Path(place) / "converted"
        write_folder(converted, read.weights, read.sparsity, read.info, read.extras)
        yield converted


def _add_what_is_new(source: Path, folder: Path) -> None:
    """Add what is said and measured in ``source`` of the same dictionary to what is known of it in
    ``folder``, which counts more."""
    here, there = read_explanations(folder), read_explanations(source)
    if new := [one for latent, one in there.items() if latent not in here]:
        keep_explanations(folder, new)
    known, found = read_info(folder)[1].metrics, read_info(source)[1].metrics
    if groups := {group: own for group, own in found.items() if group not in known}:
        keep_measurements(folder, groups)


def _places(repository: Repository, names: Sequence[str], out: Path) -> dict[str, str]:
    """Where each dictionary goes, below ``out``.

    Raises LlmWsaeError, before any is downloaded, if one would be in the place of another or of the
    record, whatever the case of the letters.
    """
    own = repository.repo_id.split("/")[-1]
    places = {name: own if name == "." else name for name in names}
    taken = {PurePosixPath(RECORD): f"the record {RECORD}"}
    for name, place in places.items():
        here = PurePosixPath(place.casefold())
        for other, holder in taken.items():
            if here.is_relative_to(other) or other.is_relative_to(here):
                raise LlmWsaeError(
                    f"{name} of {repository.repo_id} would be copied into the place of {holder}; "
                    "pull one dictionary at a time, each into a folder of its own: llm-wsae pull "
                    f"{repository.repo_id} {name} --out …"
                )
        check_replaceable(out / place)
        taken[here] = name
    return places


def fetch(repo_id: str, sae_id: str | None = None, *, revision: str | None = None) -> Path:
    """The folder in the local cache with one dictionary, or the only one, of a repository;
    ``reading.read`` judges its content. Raises as ``pull`` does."""
    repository = Repository.open(repo_id, revision)
    names = repository.wanted(sae_id)
    if len(names) > 1:
        raise UsageError(
            f"{repo_id} holds {len(names)} dictionaries, so name one; {nearest('', names)}"
        )
    return repository.dictionary_folder(names[0])


def list_dictionaries(repo_id: str, *, revision: str | None = None) -> list[Facts]:
    """What is known of every dictionary in a repository; no tensors are downloaded. Raises
    UsageError for names that do not exist, LlmWsaeError if the Hub fails or a file is damaged."""
    repository = Repository.open(repo_id, revision)
    return [repository.facts(sae_id) for sae_id in repository.wanted(None)]
