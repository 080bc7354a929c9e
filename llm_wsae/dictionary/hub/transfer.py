"""Dictionaries on the Hugging Face Hub: push, pull, list.

A repository holds many dictionaries, each in the folder ``<site>/<name>``, and one card over all of
them. A push is a single commit of what changed, made on the commit that was compared with: large
files are uploaded first and become visible only with it, so a push that breaks off anywhere leaves
the repository as it was (a process that is killed may leave a new branch, still without them). A
pull fetches into the client's cache, checks everything there, and only then copies into the user's
folder.
"""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llm_wsae.dictionary.folder import (
    CFG,
    EXTRAS,
    INFO,
    check_folder,
    copy_folder,
    write_folder,
)
from llm_wsae.dictionary.formats import reading
from llm_wsae.dictionary.hub.card import FIGURE, card
from llm_wsae.dictionary.hub.card_data import Facts, facts, folder_name
from llm_wsae.dictionary.hub.errors import hub_errors
from llm_wsae.dictionary.hub.figure import weights_figure
from llm_wsae.dictionary.hub.repository import (
    FILES,
    README,
    RemoteFile,
    Repository,
    digest_of,
    remote_files,
)
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.files import load_tensors, read_json
from llm_wsae.model.site import Site

_LARGEST_CARD = 4 << 20
_SHOWN_ID = re.compile(r"[A-Za-z0-9_.+=/-]+")  # folders that can stand in a card as they are
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
    """Paths that were written; empty when everything was there already."""


def push(
    folders: Sequence[Path],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,
) -> Pushed:
    """Put dictionary folders into a repository, which is created if it is not there.

    ``private`` is for a new repository; ``revision`` is a branch, begun at the head of ``main`` if
    it is new; ``license`` is an identifier of the Hub's such as ``mit`` for the card.

    Raises UsageError for requests that cannot be (two dictionaries of one name, one under a name
    that another model's has, a tag in place of a branch, ``private`` for a repository that is
    public, no such user), LlmWsaeError for a folder that is no whole dictionary or changed since it
    was saved, and for every failure of the Hub.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    local = _local_dictionaries(folders)
    api = HfApi()
    with hub_errors(repo_id, revision):
        head, branch_is_new = _prepare(api, repo_id, private, revision)
        files = remote_files(repo_id, head)
    remote = Repository(repo_id, None if branch_is_new else revision, head, files, None)
    known = _all_facts(local, remote)
    changed: dict[str, Path | bytes | None] = {}
    for sae_id, folder in local.items():
        changed |= _changed(sae_id, folder, remote.files)
    figures = {
        sae_id for sae_id in remote.sae_ids(own=True) if f"{sae_id}/{FIGURE}" in remote.files
    }
    drawn = {sae_id: changed[path] for sae_id in local if (path := f"{sae_id}/{FIGURE}") in changed}
    figures |= drawn.keys()
    figures -= {sae_id for sae_id, figure in drawn.items() if figure is None}
    old = _old_card(remote)
    new = card(repo_id, known, figures, old=old, license=license, revision=revision)
    if new != old:
        changed[README] = new.encode()
    if not changed and not branch_is_new:
        return Pushed(f"{constants.ENDPOINT}/{repo_id}", head, list(local), [])
    added = [CommitOperationAdd(path, new) for path, new in sorted(changed.items()) if new]
    gone = [CommitOperationDelete(path) for path, new in sorted(changed.items()) if not new]
    with hub_errors(repo_id, revision):
        # What is there already is told by the branch that is written to, or begun from.
        api.preupload_lfs_files(repo_id, added, revision=None if branch_is_new else revision)
        _check_none_is_ignored(repo_id, added)
        if branch_is_new:
            api.create_branch(repo_id, branch=revision or "main", revision=head)
        try:
            done = api.create_commit(
                repo_id,
                [*added, *gone],
                commit_message=_message(list(local)),
                revision=revision,
                parent_commit=head,
            )
        except BaseException:  # Ctrl-C too must leave no branch behind
            if branch_is_new:
                with contextlib.suppress(Exception):
                    api.delete_branch(repo_id, branch=revision or "main")
            raise
    return Pushed(str(done.commit_url), done.oid, list(local), sorted(changed))


def pull(
    repo_id: str, out: Path, sae_id: str | None = None, *, revision: str | None = None
) -> dict[str, Path]:
    """Copy one dictionary of a repository, or all of them, to ``out/<site>/<name>``.

    (One at the top of its repository goes to ``out/<repository>``.) Each is fetched, checked whole
    and only then copied, a foreign one as a dictionary of ours; an older dictionary in its place is
    replaced at once, anything else there is left alone. Returns the folders by name.

    Raises UsageError for names that are not there, LlmWsaeError when the Hub fails, when a file is
    damaged, unsafe or not what its checksum says, or when ``out`` cannot be written.
    """
    repository = Repository.open(repo_id, revision)
    folders = {}
    for name in repository.wanted(sae_id):
        source = repository.dictionary_folder(name)
        place = repo_id.split("/")[-1] if name == "." else name
        folders[name] = Path(out) / place
        if repository.layouts[name] is None:
            Site.parse(check_folder(source).site)
            copy_folder(source, folders[name])
        else:
            read = reading.read(source)
            write_folder(folders[name], read.weights, read.sparsity, read.info, read.extras)
    return folders


def fetch(repo_id: str, sae_id: str | None = None, *, revision: str | None = None) -> Path:
    """The folder in the local cache with one dictionary, or the only one, of a repository.

    The files are those that were saved, by their checksums; what they hold is for ``reading.read``
    to judge. Raises as ``pull`` does.
    """
    repository = Repository.open(repo_id, revision)
    names = repository.wanted(sae_id)
    if len(names) > 1:
        raise UsageError(
            f"{repo_id} holds {len(names)} dictionaries, so name one; {nearest('', names)}"
        )
    return repository.dictionary_folder(names[0])


def list_dictionaries(repo_id: str, *, revision: str | None = None) -> list[Facts]:
    """What is known of every dictionary in a repository; no tensors are fetched.

    Raises UsageError for names that are not there, LlmWsaeError when the Hub fails or a file is
    damaged.
    """
    repository = Repository.open(repo_id, revision)
    return [_remote_facts(repository, sae_id) for sae_id in repository.wanted(None)]


def _local_dictionaries(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by their names in the repository, each read whole once."""
    if not folders:
        raise UsageError("name at least one dictionary folder to push")
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        sae_id = folder_name(check_folder(folder))
        if sae_id in found:
            raise UsageError(
                f"{found[sae_id]} and {folder} are both named {sae_id}; push one of them, or into "
                "another repository"
            )
        found[sae_id] = folder
    return found


def _prepare(api: Any, repo_id: str, private: bool, revision: str | None) -> tuple[str, bool]:
    """The commit to build on, and whether the branch is to be made. Creates the repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    if repo_id.count("/") != 1:  # the Hub would make it under another name than it is found by
        raise UsageError(f"name the repository as user/name, not {repo_id!r}")
    try:
        found = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private or None)
        found = api.model_info(repo_id)
    if private and not found.private:
        raise UsageError(
            f"{repo_id} is there and is public, so --private cannot hide what is pushed; choose "
            "another name, or make it private in its settings"
        )
    if revision is None:
        return found.sha, False
    refs = api.list_repo_refs(repo_id)
    heads = {branch.name: branch.target_commit for branch in refs.branches}
    if revision in heads:
        return heads[revision], False
    if _COMMIT.fullmatch(revision) or revision in [tag.name for tag in refs.tags]:
        raise UsageError(
            f"{revision} is not a branch of {repo_id}, so nothing can be pushed to it; "
            f"{nearest('', heads)}"
        )
    return found.sha, True


def _check_none_is_ignored(repo_id: str, added: Sequence[Any]) -> None:
    """Raise LlmWsaeError if the repository's .gitignore would leave out files in silence."""
    if ignored := [one.path_in_repo for one in added if one._should_ignore]:
        raise LlmWsaeError(
            f"{repo_id} has a .gitignore that leaves out {', '.join(ignored)}, so nothing was "
            "pushed; remove that from it, or push to another repository"
        )


def _changed(
    sae_id: str, folder: Path, remote: "dict[str, RemoteFile]"
) -> dict[str, Path | bytes | None]:
    """The files of a dictionary that the repository has not, or has differently; None is for one
    that it should not have any more."""
    changed: dict[str, Path | bytes | None] = {}
    for name in FILES:
        path = f"{sae_id}/{name}"
        there = remote.get(path)
        if there is None or digest_of(folder / name, there) != there.digest:
            changed[path] = folder / name
    # Drawn anew only with new numbers: another version of the drawing library is no change.
    drawing = f"{sae_id}/{FIGURE}"
    if drawing not in remote or f"{sae_id}/{EXTRAS}" in changed:
        figure = weights_figure(load_tensors(folder / EXTRAS, "side tensors")[0], sae_id)
        if figure is not None or drawing in remote:  # a matrix has no figure
            changed[drawing] = figure
    return changed


def _all_facts(local: dict[str, Path], remote: Repository) -> list[Facts]:
    """Of every dictionary that the repository will hold, by name.

    Raises UsageError where one would take the place of another model's.
    """
    known = {
        sae_id: facts(
            sae_id,
            read_json(folder / CFG, "dictionary's configuration"),
            read_json(folder / INFO, "dictionary's information"),
        )
        for sae_id, folder in local.items()
    }
    for sae_id in remote.sae_ids(own=True):
        if not _SHOWN_ID.fullmatch(sae_id):
            continue
        try:
            there = _remote_facts(remote, sae_id)
        except LlmWsaeError as error:  # theirs is broken; that must not stop ours
            if sae_id not in known:
                print(f"llm-wsae: the card leaves out {sae_id}: {error}", file=sys.stderr)
            continue
        mine = known.setdefault(sae_id, there)
        if mine.model and there.model and mine.model != there.model:
            raise UsageError(
                f"{remote.repo_id} holds another dictionary named {sae_id}, of the model "
                f"{there.model}, and {local[sae_id]} is of {mine.model}; push it to another "
                "repository"
            )
    return [known[sae_id] for sae_id in sorted(known)]


def _remote_facts(repository: Repository, sae_id: str) -> Facts:
    if layout := repository.layouts[sae_id]:
        said = repository.announced(sae_id, layout)
        info = reading.info_of(layout, said, said.site or "", PurePosixPath(sae_id).name)
        return facts(sae_id, dataclasses.asdict(said), info.to_dict())
    prefix = "" if sae_id == "." else f"{sae_id}/"
    cfg = repository.read_json(prefix + CFG) if prefix + CFG in repository.files else {}
    return facts(sae_id, cfg, repository.read_json(prefix + INFO))


def _old_card(remote: Repository) -> str:
    if README not in remote.files:
        return ""
    return remote.fetch(README, _LARGEST_CARD).read_text(encoding="utf-8", errors="replace")


def _message(sae_ids: list[str]) -> str:
    more = f" and {len(sae_ids) - 3} more" if len(sae_ids) > 3 else ""
    return f"Push {', '.join(sae_ids[:3])}{more}"
