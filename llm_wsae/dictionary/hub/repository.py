"""One revision of a repository of dictionaries on the Hub, or what the local cache has of it.

Neither a repository nor its server is trusted. Paths, commits and digests in the list of files are
checked before anything is fetched, only files of a dictionary (in this package's layout or a known
foreign one) are downloaded, and what arrives is compared with its digest in the list.

Files are kept where the Hub's client looks for them: ``blobs/<digest>``, ``refs/<revision>`` and
links in ``snapshots/<commit>``. Only those are written.
"""

import contextlib
import fcntl
import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import tqdm, validate_repo_id
from huggingface_hub.utils.sha import git_hash

from llm_wsae.artifact.files import read_json, sha256
from llm_wsae.dictionary.folder import CFG, EXPLANATIONS, EXTRAS, INFO, WEIGHTS
from llm_wsae.dictionary.formats.layout import Announced, Layout
from llm_wsae.dictionary.formats.reading import layout_of
from llm_wsae.dictionary.hub.client import ask, download, hub_errors
from llm_wsae.errors import LlmWsaeError, UsageError, nearest, shown
from llm_wsae.outside import check_revision, hub_is_unreachable, integer, mapping, text
from llm_wsae.terminal import printable

FILES = (INFO, CFG, EXTRAS, WEIGHTS)  # small ones first
README = "README.md"
COMMIT = re.compile(r"[0-9a-f]{40}")
_LARGEST = {".json": 16 << 20, ".md": 4 << 20, ".jsonl": 256 << 20}  # bytes; the last: 2¹⁸ latents
_MOST_PAGES = 100  # of the list of files, a thousand on each
_PART = re.compile(r"(?!\.{1,2}$)[^\x00-\x1f\x7f\ud800-\udfff\\:*?\"<>|]+")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository."""

    size: int
    """Bytes."""
    digest: str | None
    """SHA-256 of a large file, git's id of a small one; None if only the cache was asked."""

    def is_same_as(self, path: Path) -> bool:
        """Whether a local file has this content."""
        if self.digest is None or not path.is_file():
            return False
        large = len(self.digest) == 64
        return self.digest == (sha256(path) if large else git_hash(path.read_bytes()))


@dataclass(frozen=True)
class Repository:
    """The files of one commit."""

    repo_id: str
    """``user/name``."""
    revision: str | None
    """The branch, tag or commit asked for; None for the default branch."""
    commit: str
    """The commit that it points to."""
    files: Mapping[str, RemoteFile]
    """By path in the repository."""
    is_cached: bool = False
    """Whether the Hub could not be asked, so that these are the files in the cache."""

    @classmethod
    def open(cls, repo_id: str, revision: str | None = None) -> "Repository":
        """Ask the Hub, or the local cache if the Hub cannot be reached.

        Raises UsageError for a name or revision that does not exist, LlmWsaeError without access or
        if neither Hub nor cache can answer.
        """
        check_revision(revision)
        with hub_errors(repo_id, revision):
            try:
                commit, _ = head_of(repo_id, revision)
                return cls(repo_id, revision, commit, remote_files(repo_id, commit))
            except Exception as error:
                cached = _cached(repo_id, revision) if hub_is_unreachable(error) else None
                if cached is not None:
                    return cached
                raise

    @functools.cached_property
    def layouts(self) -> dict[str, Layout | None]:
        """The dictionaries by name, sorted: their folders, "." for the repository itself.

        Folders in this package's own layout, which hold a ``wsae.json``, have the layout None.
        """
        folders: dict[str, set[str]] = {}
        for path in map(PurePosixPath, self.files):
            folders.setdefault(str(path.parent), set()).add(path.name)
        known = {name: layout_of(files) for name, files in sorted(folders.items())}
        return {name: found for name, found in known.items() if found or INFO in folders[name]}

    def wanted(self, sae_id: str | None) -> list[str]:
        """The dictionary of that name, or all of them.

        Raises UsageError, suggesting the nearest name, if there is no such dictionary; LlmWsaeError
        if there is none at all.
        """
        known = list(self.layouts)
        if not known:
            raise LlmWsaeError(f"{self._here} holds no dictionary of a layout that can be read")
        if sae_id is None:
            return known
        name = sae_id.strip("/") or "."
        if name not in known:
            raise UsageError(f"{self._here} has no dictionary {sae_id!r}; {nearest(name, known)}")
        return [name]

    def read_json(self, path: str) -> dict[str, Any]:
        """A small JSON object. Raises LlmWsaeError if it is too large or not an object."""
        value = read_json(self.fetch(path), f"{path} of {self._here}")
        if not isinstance(value, dict):
            raise LlmWsaeError(f"{path} of {self._here} is not a JSON object")
        return value

    def announced(self, sae_id: str, layout: Layout) -> Announced:
        """What a foreign dictionary's configuration and path say. Raises as ``fetch`` does."""
        config = self.read_json(inside(sae_id, layout.config))
        return layout.announce(config, PurePosixPath(self.repo_id, sae_id))

    def dictionary_folder(self, sae_id: str) -> Path:
        """The folder in the cache with the files of a dictionary; ``reading.read`` judges them.

        Raises LlmWsaeError if a file is missing, and as ``fetch`` does.
        """
        layout = self.layouts[sae_id]
        names = FILES if layout is None else layout.files
        optional = (EXPLANATIONS,) if layout is None else layout.optional
        if missing := [name for name in names if inside(sae_id, name) not in self.files]:
            raise LlmWsaeError(
                f"{sae_id} of {self._here} is not a complete dictionary of this package: it lacks "
                f"{' and '.join(missing)}"
            )
        for path in (inside(sae_id, name) for name in (*optional, *names)):
            if path in self.files:
                local = self.fetch(path)
        return local.parent

    def fetch(self, path: str) -> Path:
        """A file in the local cache, downloaded if necessary and compared with its checksum.

        Raises LlmWsaeError if it is too large for its kind, cannot be fetched or arrives damaged.
        """
        remote, limit = self.files[path], _LARGEST.get(PurePosixPath(path).suffix)
        if limit is not None and remote.size > limit:
            raise LlmWsaeError(
                f"{path} of {self._here} is not read: it has {remote.size:,} bytes, but at most "
                f"{limit:,} are possible"
            )
        root = _cache_folder(self.repo_id)
        link = root / "snapshots" / self.commit / path
        if self.is_cached:
            return link
        with hub_errors(self.repo_id, self.revision):
            if not remote.is_same_as(link):
                blob = root / "blobs" / str(remote.digest)
                blob.parent.mkdir(parents=True, exist_ok=True)
                link.parent.mkdir(parents=True, exist_ok=True)
                with open(root / ".llm-wsae.lock", "a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)  # held until it is closed
                    if not remote.is_same_as(blob):
                        self._download(path, remote, blob)
                    link.unlink(missing_ok=True)
                    link.symlink_to(os.path.relpath(blob, link.parent))
            if self.revision != self.commit:  # so that the cache can answer offline
                ref = root / "refs" / (self.revision or "main")
                with contextlib.suppress(OSError):
                    ref.parent.mkdir(parents=True, exist_ok=True)
                    ref.write_text(self.commit)
        return link

    def _download(self, path: str, remote: RemoteFile, blob: Path) -> None:
        """Put a file's content at ``blob``; what a broken download left beside it is continued."""
        partial = blob.with_name(f"{blob.name}.incomplete")
        shown_as = {"total": remote.size, "unit": "B", "unit_scale": True, "desc": printable(path)}
        with open(partial, "ab") as file, tqdm(**shown_as) as bar:
            download(self.repo_id, self.commit, path, file, remote.size, bar.update)
        if not remote.is_same_as(partial):
            partial.unlink()
            raise LlmWsaeError(
                f"{path} of {self._here} arrived damaged: its checksum is not the one that the Hub "
                "names; run the same command again"
            )
        partial.replace(blob)

    @property
    def _here(self) -> str:
        name = f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id
        return f"the local cache of {name}" if self.is_cached else name


def head_of(repo_id: str, revision: str | None = None) -> tuple[str, bool]:
    """The commit of a revision, or of the default branch, and whether the repository is private.

    Raises as ``ask`` does, and ValueError for a name or an answer that cannot be one.
    """
    validate_repo_id(repo_id)
    at = "" if revision is None else f"/revision/{quote(revision, safe='')}"
    said = mapping(ask(f"{repo_id}{at}")[0])
    return commit_of(said.get("sha")), said.get("private") is True


def commit_of(value: Any) -> str:
    """The value if it is the id of a commit. Raises ValueError for anything else: a commit that a
    server names becomes the name of a folder."""
    if not (isinstance(value, str) and COMMIT.fullmatch(value)):
        raise ValueError(f"{shown(value)} is not the id of a commit")
    return value


def remote_files(repo_id: str, commit: str) -> dict[str, RemoteFile]:
    """The files of a commit on the Hub.

    Raises LlmWsaeError if one of their paths would leave the folder or there are too many, and as
    ``ask`` does; ValueError for entries that are none.
    """
    files: dict[str, RemoteFile] = {}
    asked = {"recursive": "true"}
    for _ in range(_MOST_PAGES):
        entries, cursor = ask(f"{repo_id}/tree/{commit}", asked)
        for entry in map(mapping, entries):
            if entry.get("type") == "file":
                files.update([_entry(repo_id, entry)])
        if cursor is None:
            return files
        asked["cursor"] = cursor
    raise LlmWsaeError(f"{repo_id} lists files without an end, so nothing of it is read")


def _entry(repo_id: str, said: Mapping[str, Any]) -> tuple[str, RemoteFile]:
    """Path and file of an entry in the list. Raises as ``remote_files`` does."""
    path, size = text(said.get("path")), integer(said.get("size"))
    digest = text(mapping(said.get("lfs")).get("oid", said.get("oid")))
    if path is None or size is None or size < 0 or not _DIGEST.fullmatch(digest or ""):
        raise ValueError(f"its list of files has {shown(said)}")
    if not all(map(_PART.fullmatch, path.split("/"))):
        raise LlmWsaeError(
            f"{repo_id} names a file {shown(path)}, which cannot be put into a folder safely, so "
            "nothing of it is read"
        )
    return path, RemoteFile(size, digest)


def _cache_folder(repo_id: str) -> Path:
    """The folder of a repository in the client's cache."""
    name = repo_folder_name(repo_id=repo_id, repo_type="model")
    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / name


def inside(sae_id: str, name: str) -> str:
    """The path in a repository of a dictionary's file; "." is the repository itself."""
    return str(PurePosixPath(sae_id) / name)


def _cached(repo_id: str, revision: str | None) -> Repository | None:
    """What the local cache has of a revision."""
    root = _cache_folder(repo_id)
    try:
        named = root / "refs" / (revision or "main")
        commit = commit_of(named.read_text().strip() if named.is_file() else revision)
        folder = root / "snapshots" / commit
        files = {
            path.relative_to(folder).as_posix(): RemoteFile(path.stat().st_size, None)
            for path in folder.rglob("*")
            if path.is_file()
        }
    except (OSError, ValueError):
        return None
    return Repository(repo_id, revision, commit, files, is_cached=True) if files else None
