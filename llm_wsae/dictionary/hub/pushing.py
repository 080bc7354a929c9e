"""Dictionaries are put on the Hugging Face Hub.

A repository holds many dictionaries, each in the folder ``<site>/<name>``, and one card for all of
them. A push is a single commit of what changed, on top of the commit that it was compared with.
Large files are uploaded first and become visible only with the commit, so a push that breaks off
leaves the repository as it was (a process that is killed may leave a new, unchanged branch).
"""

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from llm_wsae.artifact.files import read_json
from llm_wsae.dictionary.explanations import Explanation, keep_explanations, read_explanations
from llm_wsae.dictionary.folder import (
    CFG,
    EXPLANATIONS,
    INFO,
    WEIGHTS,
    check_folder,
    keep_measurements,
)
from llm_wsae.dictionary.hub.card import card
from llm_wsae.dictionary.hub.card_data import Facts, facts, folder_name
from llm_wsae.dictionary.hub.client import ask, hub_errors
from llm_wsae.dictionary.hub.pulling import remote_facts
from llm_wsae.dictionary.hub.repository import (
    COMMIT,
    FILES,
    README,
    Repository,
    commit_of,
    head_of,
    remote_files,
)
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.outside import check_revision, mapping

_SHOWN_ID = re.compile(r"[A-Za-z0-9_.+=/-]+")  # folders that a card can show unescaped


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
        remote = Repository(repo_id, revision, head, remote_files(repo_id, head))
    theirs = _their_facts(local, remote)
    with tempfile.TemporaryDirectory() as place:
        staged = {name: _staged(name, local[name], remote, Path(place)) for name in local}
        known = theirs | {name: _facts(name, folder) for name, folder in staged.items()}
        old = ""
        if README in remote.files:
            old = remote.fetch(README).read_text(encoding="utf-8", errors="replace")
        ordered = [known[name] for name in sorted(known)]
        new = card(repo_id, ordered, old=old, license=license, revision=revision)
        changed: dict[str, Path | bytes | None] = {} if new == old else {README: new.encode()}
        for name, folder in staged.items():
            changed |= _changed(name, folder, remote)
        if not changed and not is_new:
            return Pushed(f"{constants.ENDPOINT}/{repo_id}", head, list(local), [])
        with hub_errors(repo_id, revision):
            done = _commit(remote, changed, is_new, f"Push {', '.join(local)}"[:72])
            commit = commit_of(done.oid)
        return Pushed(str(done.commit_url), commit, list(local), sorted(changed))


def _local_dictionaries(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by their names in the repository, each checked completely."""
    if not folders:
        raise UsageError("name at least one dictionary folder to push")
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        sae_id = folder_name(check_folder(folder))
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
    try:
        main, is_private = head_of(repo_id)
    except RepositoryNotFoundError:
        HfApi().create_repo(repo_id, private=private or None)
        main, is_private = head_of(repo_id)
    if private and not is_private:
        raise UsageError(
            f"{repo_id} exists and is public, so --private cannot hide what is pushed; choose "
            "another name, or make it private in its settings"
        )
    if revision is None:
        return main, False
    said = mapping(ask(f"{repo_id}/refs")[0])
    heads, tags = (
        {str(one["name"]): one["targetCommit"] for one in said[kind]}
        for kind in ("branches", "tags")
    )
    if revision in heads:
        return commit_of(heads[revision]), False
    if COMMIT.fullmatch(revision) or revision in tags:
        raise UsageError(
            f"{revision} is not a branch of {repo_id}, so nothing can be pushed to it; "
            f"{nearest('', heads)}"
        )
    return main, True


def _staged(sae_id: str, folder: Path, remote: Repository, place: Path) -> Path:
    """The folder, or, where others described the same weights, a copy below ``place`` that also
    holds what others measured and said; what is known here counts more."""

    def differs(name: str) -> bool:
        there = remote.files.get(f"{sae_id}/{name}")
        return there is None or not there.is_same_as(folder / name)

    info, said = f"{sae_id}/{INFO}", f"{sae_id}/{EXPLANATIONS}"
    if info not in remote.files or differs(WEIGHTS):
        return folder
    explained = said in remote.files and (folder / EXPLANATIONS).is_file() and differs(EXPLANATIONS)
    theirs = remote.fetch(said if explained else info).parent
    remote.fetch(info)
    found: Mapping[str, Any] = {}
    said_there: list[Explanation] = []
    with contextlib.suppress(LlmWsaeError):  # what is damaged there is replaced
        found = mapping(mapping(read_json(theirs / INFO, "information")).get("metrics"))
        said_there = list(read_explanations(theirs).values()) if explained else []
    copy = shutil.copytree(folder.resolve(), place / sae_id, copy_function=os.symlink)
    (copy / INFO).unlink()
    shutil.copyfile(folder / INFO, copy / INFO)  # measurements are not kept through a link
    known = check_folder(folder).metrics
    if new := {group: own for group, own in found.items() if group not in known}:
        keep_measurements(copy, new)
    if said_there:
        keep_explanations(copy, said_there)
        keep_explanations(copy, read_explanations(folder).values())
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


def _commit(
    remote: Repository, changed: Mapping[str, Path | bytes | None], is_new: bool, message: str
) -> Any:
    """Commit the changes, on a new branch if it ``is_new``; after a failure none is left."""
    added = [CommitOperationAdd(path, new) for path, new in sorted(changed.items()) if new]
    gone = [CommitOperationDelete(path) for path, new in sorted(changed.items()) if not new]
    api, repo_id, revision = HfApi(), remote.repo_id, remote.revision
    if is_new:
        api.create_branch(repo_id, branch=str(revision), revision=remote.commit)
    try:
        api.preupload_lfs_files(repo_id, added, revision=revision)
        if ignored := [one.path_in_repo for one in added if one._should_ignore]:
            raise LlmWsaeError(
                f"{repo_id} has a .gitignore that excludes {', '.join(ignored)}, so nothing was "
                "pushed; remove the entry, or push to another repository"
            )
        return api.create_commit(
            repo_id,
            [*added, *gone],
            commit_message=message,
            revision=revision,
            parent_commit=remote.commit,
        )
    except BaseException:  # Ctrl-C too
        if is_new:
            with contextlib.suppress(Exception):
                api.delete_branch(repo_id, branch=str(revision))
        raise


def _facts(sae_id: str, folder: Path) -> Facts:
    cfg = read_json(folder / CFG, "dictionary's configuration")
    return facts(sae_id, cfg, read_json(folder / INFO, "dictionary's information"))


def _their_facts(local: Mapping[str, Path], remote: Repository) -> dict[str, Facts]:
    """The facts of the dictionaries in the repository that the card names.

    Raises UsageError if one of them is of another model and would be replaced.
    """
    known: dict[str, Facts] = {}
    for sae_id, layout in remote.layouts.items():
        if not _SHOWN_ID.fullmatch(sae_id) or (layout is not None and sae_id not in local):
            continue
        try:
            there = known[sae_id] = remote_facts(remote, sae_id)
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
