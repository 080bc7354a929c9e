"""Dictionaries on the Hugging Face Hub: push, pull, list.

A repository holds many dictionaries, each in the folder ``<site>/<name>``, and one card for all of
them. A push is a single commit of what changed, on top of the commit that it was compared with.
Large files are uploaded first and become visible only with the commit, so a push that breaks off
leaves the repository as it was (a process that is killed may leave a new, unchanged branch). A pull
downloads into the client's cache, checks everything there, and only then copies into the user's
folder.
"""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llm_wsae.dictionary.explanations import keep_explanations, read_explanations
from llm_wsae.dictionary.folder import (
    CFG,
    EXPLANATIONS,
    EXTRAS,
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
from llm_wsae.dictionary.hub.card import FIGURE, card, weights_figure
from llm_wsae.dictionary.hub.card_data import Facts, facts, folder_name
from llm_wsae.dictionary.hub.errors import hub_errors
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
from llm_wsae.outputs import check_file, is_record_of
from llm_wsae.outside import check_revision, mapping
from llm_wsae.provenance import write_record

RECORD = "pull.json"
"""The record of the command, next to the dictionaries."""
_LARGEST_CARD = 4 << 20
_SHOWN_ID = re.compile(r"[A-Za-z0-9_.+=/-]+")  # folders that a card can show unescaped
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
    if it is new; ``license`` is one of the Hub's identifiers, such as ``mit``, for the card.

    Raises UsageError for impossible requests (two dictionaries of one name, a name taken by another
    model's dictionary, a tag instead of a branch, ``private`` for a public repository, no such
    user), LlmWsaeError for a folder that is not a complete dictionary or changed since it was
    saved, and for every failure of the Hub.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    check_revision(revision)
    local = _local_dictionaries(folders)
    api = HfApi()
    with hub_errors(repo_id, revision):
        head, new_branch = _prepare(api, repo_id, private, revision)
        files = remote_files(repo_id, head)
    remote = Repository(repo_id, None if new_branch else revision, head, files, None)
    known = _all_facts(local, remote)
    changed: dict[str, Path | bytes | None] = {}
    for sae_id, folder in local.items():
        changed |= _changed(sae_id, folder, files)
    figures = {
        sae_id
        for sae_id in {*remote.sae_ids(own=True), *local}
        if changed.get(path := f"{sae_id}/{FIGURE}", files.get(path)) is not None
    }
    old = _old_card(remote)
    new = card(repo_id, known, figures, old=old, license=license, revision=revision)
    if new != old:
        changed[README] = new.encode()
    if not changed and not new_branch:
        return Pushed(f"{constants.ENDPOINT}/{repo_id}", head, list(local), [])
    added = [CommitOperationAdd(path, new) for path, new in sorted(changed.items()) if new]
    gone = [CommitOperationDelete(path) for path, new in sorted(changed.items()) if not new]
    with hub_errors(repo_id, revision), _branch(api, repo_id, revision, head, new_branch):
        api.preupload_lfs_files(repo_id, added, revision=revision)
        _check_none_is_ignored(repo_id, added)
        done = api.create_commit(
            repo_id,
            [*added, *gone],
            commit_message=_message(list(local)),
            revision=revision,
            parent_commit=head,
        )
    return Pushed(str(done.commit_url), done.oid, list(local), sorted(changed))


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
    return [_remote_facts(repository, sae_id) for sae_id in repository.wanted(None)]


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
        found = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private or None)
        found = api.model_info(repo_id)
    if private and not found.private:
        raise UsageError(
            f"{repo_id} exists and is public, so --private cannot hide what is pushed; choose "
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
    # Redrawn only for new numbers: another version of the drawing library is no change.
    drawing = f"{sae_id}/{FIGURE}"
    if drawing not in remote or f"{sae_id}/{EXTRAS}" in changed:
        figure = weights_figure(load_tensors(folder / EXTRAS, "side tensors")[0], sae_id)
        if figure is not None or drawing in remote:  # a matrix has no figure
            changed[drawing] = figure
    return changed


def _all_facts(local: dict[str, Path], remote: Repository) -> list[Facts]:
    """The facts of every dictionary that the repository will hold, sorted by name.

    Raises UsageError if one would replace another model's dictionary.
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
