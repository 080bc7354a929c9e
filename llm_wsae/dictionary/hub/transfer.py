"""``push`` puts dictionaries on the Hugging Face Hub; ``pull`` copies them into a folder, ``fetch``
opens one, ``list_dictionaries`` lists them.

A repository holds many dictionaries, each in the folder ``<site>/<name>``, and one card for all of
them. A push is a single commit of what changed, on top of the commit that it was compared with; one
that breaks off leaves at most a new branch. A pull checks everything in the client's cache before
it copies into the user's folder, where it never replaces a dictionary.
"""

import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from llm_wsae.artifact.artifact import check_file, is_record_of
from llm_wsae.artifact.files import folder_lock
from llm_wsae.artifact.provenance import write_record
from llm_wsae.dictionary.explanations import keep_explanations, read_explanations
from llm_wsae.dictionary.folder import (
    EXPLANATIONS,
    INFO,
    WEIGHTS,
    clear_up,
    copy_folder,
    is_dictionary,
    keep_measurements,
    read_facts,
    read_folder,
    read_info,
    weights_checksum,
    write_folder,
)
from llm_wsae.dictionary.formats import reading
from llm_wsae.dictionary.hub.card import card
from llm_wsae.dictionary.hub.repository import (
    COMMIT,
    FILES,
    Repository,
    commit_of,
    hub_errors,
    inside,
)
from llm_wsae.dictionary.info import DictionaryInfo, Facts
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.outside import check_revision

_README = "README.md"
_SHOWN_ID = re.compile(r"[A-Za-z0-9_.+=/-]+")  # folders that a card can show unescaped
_UNSAFE = re.compile(r"[^A-Za-z0-9_.+=-]+")
_RECORD = "pull.json"


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    url: str  # of the commit, or of the repository if nothing had changed
    commit: str  # which now holds the dictionaries
    sae_ids: list[str]
    changed: list[str]  # paths that were written


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
    if it is new; ``license`` is one of the Hub's identifiers. What others measured and said of the
    same weights there stays. Raises UsageError for requests that cannot be, LlmWsaeError for a
    folder that is no intact dictionary and every failure of the Hub.
    """
    check_revision(revision)
    local = _local_dictionaries(folders)
    with hub_errors(repo_id, revision):
        start, is_new = _prepare(repo_id, private, revision)
        remote = Repository.at(repo_id, revision, start)
    theirs = _their_facts(local, remote)
    with tempfile.TemporaryDirectory() as place:
        staged = {name: _staged(name, local[name], remote, Path(place)) for name in local}
        known = theirs | {name: read_facts(folder, name) for name, folder in staged.items()}
        old = ""
        if _README in remote.files:
            old = remote.fetch(_README).read_text(encoding="utf-8", errors="replace")
        ordered = [known[name] for name in sorted(known)]
        new = card(repo_id, ordered, old=old, license=license, revision=revision)
        todo = [one for name, folder in staged.items() for one in _operations(name, folder, remote)]
        if new != old:
            todo.append(CommitOperationAdd(_README, new.encode()))
        if not todo and not is_new:
            return Pushed(f"{constants.ENDPOINT}/{repo_id}", remote.commit, list(local), [])
        with hub_errors(repo_id, revision):
            if is_new:
                HfApi().create_branch(repo_id, branch=str(revision), revision=remote.commit)
            added = [one for one in todo if isinstance(one, CommitOperationAdd)]
            HfApi().preupload_lfs_files(repo_id, added, revision=revision)
            # The client silently leaves such files out of the commit.
            if ignored := [one.path_in_repo for one in added if one._should_ignore]:
                raise LlmWsaeError(
                    f"{repo_id} has a .gitignore that excludes {', '.join(ignored)}, so nothing "
                    "was pushed; remove the entry, or push to another repository"
                )
            done = HfApi().create_commit(
                repo_id,
                todo,
                commit_message=f"Push {', '.join(local)}"[:72],
                revision=revision,
                parent_commit=remote.commit,
            )
            commit = commit_of(done.oid)
        changed = sorted(one.path_in_repo for one in todo)
        return Pushed(str(done.commit_url), commit, list(local), changed)


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


def _prepare(repo_id: str, private: bool, revision: str | None) -> tuple[Any, bool]:
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
        return main.sha, False
    refs = api.list_repo_refs(repo_id)
    heads = {one.name: one.target_commit for one in refs.branches}
    if revision in heads:
        return heads[revision], False
    if COMMIT.fullmatch(revision) or revision in [one.name for one in refs.tags]:
        raise UsageError(
            f"{revision} is not a branch of {repo_id}, so nothing can be pushed to it; "
            f"{nearest('', heads)}"
        )
    return main.sha, True


def _staged(sae_id: str, folder: Path, remote: Repository, place: Path) -> Path:
    """The folder, or a copy below ``place`` with what others said of the same weights besides."""
    weights, info, said = (inside(sae_id, name) for name in (WEIGHTS, INFO, EXPLANATIONS))
    same = weights in remote.files and remote.files[weights].is_same_as(folder / WEIGHTS)
    if not same or info not in remote.files:
        return folder
    theirs = [remote.fetch(path).parent for path in (info, said) if path in remote.files]
    copy = place / sae_id
    copy_folder(folder, copy)
    with contextlib.suppress(LlmWsaeError):  # what is damaged there is replaced
        _add_what_is_new(theirs[0], copy)
    return copy


def _operations(
    sae_id: str, folder: Path, remote: Repository
) -> Iterator[CommitOperationAdd | CommitOperationDelete]:
    """What must be done to the files of a dictionary in the repository."""
    new_weights = False
    for name in (*FILES, EXPLANATIONS):
        path, local = inside(sae_id, name), folder / name
        there = remote.files.get(path)
        if local.is_file() and not (there and there.is_same_as(local)):
            new_weights |= name == WEIGHTS
            yield CommitOperationAdd(path, local)
        elif there and not local.is_file() and new_weights:
            yield CommitOperationDelete(path)  # it explains the older weights


def _their_facts(local: Mapping[str, Path], remote: Repository) -> dict[str, Facts]:
    """Of the dictionaries there that the card names. Raises UsageError for another model's."""
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
        mine = read_facts(local[sae_id], sae_id) if sae_id in local else there
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

    Each is checked completely before; a foreign one is converted to this package's layout. A
    dictionary there with the same weights stays, and receives what the repository knows besides.
    Raises UsageError for names that do not exist, LlmWsaeError if the Hub fails, a file is damaged
    or unsafe, or ``out`` cannot be written or holds something else there.
    """
    out = Path(out)
    check_file(out / _RECORD, is_record_of("pull"))
    repository, own = Repository.open(repo_id, revision), repo_id.split("/")[-1]
    folders = {name: out / (own if name == "." else name) for name in repository.wanted(sae_id)}
    with tempfile.TemporaryDirectory() as place:
        for name, folder in folders.items():
            source = repository.dictionary_folder(name)
            content = reading.read(source)
            if repository.layouts[name] is not None:
                source = Path(place) / "converted"
                write_folder(source, content)
            with folder_lock(out, "pulled dictionaries"):
                _add(source, folder)
    asked = {"repo_id": repo_id, "sae_id": sae_id, "revision": revision}
    write_record(out / _RECORD, "pull", asked)
    return folders


def _add(source: Path, folder: Path) -> None:
    """Copy a dictionary to a folder, or what is new in it if the folder has the same weights."""
    clear_up(folder, lock=True)
    if is_dictionary(folder) and weights_checksum(folder) != weights_checksum(source):
        raise LlmWsaeError(
            f"{folder} holds another dictionary, or another version of this one, and a pull "
            "replaces none; move it away, or choose another --out"
        )
    try:
        read_folder(folder)
    except LlmWsaeError:  # missing, or damaged since
        copy_folder(source, folder)
    _add_what_is_new(source, folder)


def _add_what_is_new(source: Path, folder: Path) -> None:
    """Add what ``source`` knows of the same dictionary; what ``folder`` does counts more."""
    here, there = read_explanations(folder), read_explanations(source)
    if new := [one for latent, one in there.items() if latent not in here]:
        keep_explanations(folder, new)
    known, found = read_info(folder)[1].metrics, read_info(source)[1].metrics
    if groups := {group: own for group, own in found.items() if group not in known}:
        keep_measurements(folder, groups)


def fetch(repo_id: str, sae_id: str | None = None, *, revision: str | None = None) -> Path:
    """The folder in the cache with one dictionary of a repository, or the only one, as it came.
    Raises as ``pull`` does."""
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
