"""Dictionaries are put on the Hugging Face Hub.

A repository holds many dictionaries, each in the folder ``<site>/<name>``, and one card for all of
them. A push is a single commit of what changed, on top of the commit that it was compared with.
Large files are uploaded first and become visible only with the commit, so a push that breaks off
leaves the repository as it was (a process that is killed may leave a new, unchanged branch).
"""

import contextlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_wsae.artifact.files import read_json
from llm_wsae.dictionary.explanations import keep_explanations, read_explanations
from llm_wsae.dictionary.folder import (
    CFG,
    EXPLANATIONS,
    EXTRAS,
    INFO,
    WEIGHTS,
    check_folder,
    keep_measurements,
)
from llm_wsae.dictionary.hub.asking import COMMIT, commit_of, guarded, references
from llm_wsae.dictionary.hub.card import card
from llm_wsae.dictionary.hub.card_data import Facts, facts, folder_name
from llm_wsae.dictionary.hub.errors import hub_errors
from llm_wsae.dictionary.hub.pulling import remote_facts
from llm_wsae.dictionary.hub.repository import (
    FILES,
    LARGEST_EXPLANATIONS,
    LARGEST_JSON,
    README,
    RemoteFile,
    Repository,
    digest_of,
    head_of,
    remote_files,
)
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.outside import check_revision, mapping

_LARGEST_CARD = 4 << 20
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
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    check_revision(revision)
    local = _local_dictionaries(folders)
    api = HfApi()
    with hub_errors(repo_id, revision), guarded():
        head, new_branch = _prepare(api, repo_id, private, revision)
        files = remote_files(repo_id, head)
    remote = Repository(repo_id, None if new_branch else revision, head, files, None)
    known = _all_facts(local, remote)
    with tempfile.TemporaryDirectory() as place:
        local = _with_what_is_there(local, remote, Path(place))
        known |= {sae_id: _facts(sae_id, folder) for sae_id, folder in local.items()}
        changed: dict[str, Path | bytes | None] = {}
        for sae_id, folder in local.items():
            changed |= _changed(sae_id, folder, files)
        old = _old_card(remote)
        new = card(
            repo_id,
            [known[name] for name in sorted(known)],
            old=old,
            license=license,
            revision=revision,
        )
        if new != old:
            changed[README] = new.encode()
        if not changed and not new_branch:
            return Pushed(f"{constants.ENDPOINT}/{repo_id}", head, list(local), [])
        added = [CommitOperationAdd(path, new) for path, new in sorted(changed.items()) if new]
        gone = [CommitOperationDelete(path) for path, new in sorted(changed.items()) if not new]
        with hub_errors(repo_id, revision), guarded():
            with _branch(api, repo_id, revision, head, new_branch):
                api.preupload_lfs_files(repo_id, added, revision=revision)
                _check_none_is_ignored(repo_id, added)
                done = api.create_commit(
                    repo_id,
                    [*added, *gone],
                    commit_message=_message(list(local)),
                    revision=revision,
                    parent_commit=head,
                )
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


def _prepare(api: Any, repo_id: str, private: bool, revision: str | None) -> tuple[str, bool]:
    """The commit to build on, and whether the branch is new. Creates a missing repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    if repo_id.count("/") != 1:  # the Hub would make it under another name than it is found by
        raise UsageError(f"name the repository as user/name, not {repo_id!r}")
    try:
        main, is_private = head_of(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private or None)
        main, is_private = head_of(repo_id)
    if private and not is_private:
        raise UsageError(
            f"{repo_id} exists and is public, so --private cannot hide what is pushed; choose "
            "another name, or make it private in its settings"
        )
    if revision is None:
        return main, False
    heads = references(repo_id, "branches")
    if revision in heads:
        return heads[revision], False
    if COMMIT.fullmatch(revision) or revision in references(repo_id, "tags"):
        raise UsageError(
            f"{revision} is not a branch of {repo_id}, so nothing can be pushed to it; "
            f"{nearest('', heads)}"
        )
    return main, True


@contextlib.contextmanager
def _branch(api: Any, repo_id: str, revision: str | None, head: str, new: bool) -> Iterator[None]:
    """Begin a ``new`` branch at ``head``; if the block fails, also by Ctrl-C, no branch is left."""
    if not new:
        yield
        return
    api.create_branch(repo_id, branch=revision, revision=head)
    try:
        yield
    except BaseException:  # Ctrl-C too: no branch must be left
        with contextlib.suppress(Exception):
            api.delete_branch(repo_id, branch=revision)
        raise


def _check_none_is_ignored(repo_id: str, added: Sequence[Any]) -> None:
    """Raises LlmWsaeError if the repository's .gitignore would silently omit files."""
    if ignored := [one.path_in_repo for one in added if one._should_ignore]:
        raise LlmWsaeError(
            f"{repo_id} has a .gitignore that excludes {', '.join(ignored)}, so nothing was "
            "pushed; remove the entry, or push to another repository"
        )


def _with_what_is_there(local: dict[str, Path], remote: Repository, place: Path) -> dict[str, Path]:
    """The folders, or, where others described the same weights, copies below ``place`` that also
    hold what others measured and said; what is known here counts more."""

    def differs(sae_id: str, name: str) -> bool:
        path, there = local[sae_id] / name, remote.files.get(f"{sae_id}/{name}")
        return bool(there and path.is_file() and digest_of(path, there) != there.digest)

    joined = dict(local)
    for sae_id, folder in local.items():
        there = all(f"{sae_id}/{name}" in remote.files for name in (INFO, WEIGHTS))
        explained = differs(sae_id, EXPLANATIONS)
        if not there or differs(sae_id, WEIGHTS) or not (explained or differs(sae_id, INFO)):
            continue
        theirs = remote.fetch(f"{sae_id}/{INFO}", LARGEST_JSON).parent
        if explained:
            remote.fetch(f"{sae_id}/{EXPLANATIONS}", LARGEST_EXPLANATIONS)
        copy = joined[sae_id] = place / sae_id
        copy.mkdir(parents=True)
        for name in (CFG, WEIGHTS, EXTRAS):
            (copy / name).symlink_to((folder / name).resolve())
        for name in (INFO, EXPLANATIONS):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, copy / name)
        mine = read_explanations(folder).values()
        with contextlib.suppress(LlmWsaeError):  # what is damaged there is replaced
            found = mapping(mapping(read_json(theirs / INFO, "information")).get("metrics"))
            known = check_folder(folder).metrics
            if new := {group: own for group, own in found.items() if group not in known}:
                keep_measurements(copy, new)
            if explained:
                keep_explanations(copy, read_explanations(theirs).values())
                keep_explanations(copy, mine)
    return joined


def _changed(
    sae_id: str, folder: Path, remote: "dict[str, RemoteFile]"
) -> dict[str, Path | bytes | None]:
    """The files of a dictionary that the repository lacks or has differently; None for one that
    must be deleted."""
    changed: dict[str, Path | bytes | None] = {}
    explained = (folder / EXPLANATIONS).is_file()
    for name in (*FILES, EXPLANATIONS) if explained else FILES:
        path = f"{sae_id}/{name}"
        there = remote.get(path)
        if there is None or digest_of(folder / name, there) != there.digest:
            changed[path] = folder / name
    older = f"{sae_id}/{EXPLANATIONS}"
    if not explained and older in remote and f"{sae_id}/{WEIGHTS}" in changed:
        changed[older] = None  # of the older weights
    return changed


def _facts(sae_id: str, folder: Path) -> Facts:
    return facts(
        sae_id,
        read_json(folder / CFG, "dictionary's configuration"),
        read_json(folder / INFO, "dictionary's information"),
    )


def _all_facts(local: dict[str, Path], remote: Repository) -> dict[str, Facts]:
    """The facts of every dictionary that the card will name.

    Raises UsageError if one would replace another model's dictionary.
    """
    known = {sae_id: _facts(sae_id, folder) for sae_id, folder in local.items()}
    for sae_id, layout in remote.layouts.items():
        if not _SHOWN_ID.fullmatch(sae_id) or (layout is not None and sae_id not in known):
            continue
        try:
            there = remote_facts(remote, sae_id)
        except LlmWsaeError as error:  # a broken one must not stop the push
            if sae_id not in known:
                print(f"llm-wsae: the card omits {sae_id}: {error}", file=sys.stderr)
            continue
        mine = known.setdefault(sae_id, there)
        if mine.model and there.model and mine.model != there.model:
            raise UsageError(
                f"{remote.repo_id} holds another dictionary named {sae_id}, for the model "
                f"{there.model}, and {local[sae_id]} is for {mine.model}; push it to another "
                "repository"
            )
    return known


def _old_card(remote: Repository) -> str:
    if README not in remote.files:
        return ""
    return remote.fetch(README, _LARGEST_CARD).read_text(encoding="utf-8", errors="replace")


def _message(sae_ids: list[str]) -> str:
    more = f" and {len(sae_ids) - 3} more" if len(sae_ids) > 3 else ""
    return f"Push {', '.join(sae_ids[:3])}{more}"
