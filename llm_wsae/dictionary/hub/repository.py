"""One revision of a repository of dictionaries on the Hub, or what the local cache has of it.

Neither a repository nor its server is trusted. The list of files is checked before anything is
fetched: a path that leaves the folder is refused, commits and digests must be hexadecimal, and only
files of a dictionary (in this package's layout or a known foreign one) are ever downloaded, JSON up
to a fixed size, tensors up to the size that the configuration announces. What arrives is compared
with its digest in the list and, in this package's layout, with the one in ``wsae.json``.

Files are kept where the Hub's client looks for them: ``blobs/<digest>``, ``refs/<revision>`` and
links in ``snapshots/<commit>``. Only those are written.
"""

import contextlib
import fcntl
import functools
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from llm_wsae.artifact.files import read_json, sha256
from llm_wsae.dictionary.folder import CFG, EXPLANATIONS, EXTRAS, INFO, WEIGHTS
from llm_wsae.dictionary.formats.layout import Announced, Layout
from llm_wsae.dictionary.formats.reading import layout_of
from llm_wsae.dictionary.hub.asking import ask, commit_of, download
from llm_wsae.dictionary.hub.errors import hub_errors
from llm_wsae.errors import LlmWsaeError, UsageError, nearest, shown
from llm_wsae.outside import check_revision, hub_is_unreachable, integer, mapping, text
from llm_wsae.terminal import printable

FILES = (INFO, CFG, EXTRAS, WEIGHTS)  # small ones first
README = "README.md"
LARGEST_JSON = 16 << 20
LARGEST_EXPLANATIONS = 256 << 20  # a line of 1 kB for each of 2¹⁸ latents
_HEADER = 1 << 20  # bytes of a safetensors header, far more than needed
_MATRICES = 4  # of d_in × d_in numbers in the side tensors, at most
_WIDEST = 1 << 15  # dimensions of a residual stream, where a layout does not announce them
_MOST_LATENTS = 1 << 20
_MOST_FILES = 100_000  # of a repository
_MOST_PAGES = 200  # of the list of them
_LONGEST_LIST = 600  # seconds
_PART = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff\\:*?\"<>|]+")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository."""

    size: int
    """Bytes."""
    digest: str | None
    """SHA-256 of a large file, git's id of a small one; None if only the cache was asked."""


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
    cache: Path | None
    """The commit's folder in the local cache, if the Hub could not be asked."""

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
                return cls(repo_id, revision, commit, remote_files(repo_id, commit), None)
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
        value = read_json(self.fetch(path, LARGEST_JSON), f"{path} of {self._here}")
        if not isinstance(value, dict):
            raise LlmWsaeError(f"{path} of {self._here} is not a JSON object")
        return value

    def announced(self, sae_id: str, layout: Layout) -> Announced:
        """What a foreign dictionary's configuration and path say. Raises as ``fetch`` does."""
        config = self.read_json(inside(sae_id, layout.config))
        return layout.announce(config, PurePosixPath(self.repo_id, sae_id))

    def dictionary_folder(self, sae_id: str) -> Path:
        """The folder in the cache with the files of a dictionary, downloaded and compared.

        ``reading.read`` judges their content. Raises LlmWsaeError if a file is missing, larger than
        it can be, or not the one that was saved.
        """
        layout = self.layouts[sae_id]
        if layout is not None:
            announced = self.announced(sae_id, layout)
            for path in (inside(sae_id, name) for name in layout.optional):
                if path in self.files:
                    self.fetch(path, LARGEST_JSON)
            limit = _largest_weights(
                min(announced.d_in or _WIDEST, _WIDEST),
                min(announced.d_sae or _MOST_LATENTS, _MOST_LATENTS),
            )
            return self.fetch(inside(sae_id, layout.weights), limit).parent
        paths = {name: inside(sae_id, name) for name in FILES}
        if missing := [name for name, path in paths.items() if path not in self.files]:
            raise LlmWsaeError(
                f"{sae_id} of {self._here} is not a complete dictionary of this package: it lacks "
                f"{' and '.join(missing)}"
            )
        digests = self.read_json(paths[INFO]).get("sha256")
        limits = self._largest_tensors(paths[CFG])
        for name, limit in limits.items():
            local = self.fetch(paths[name], limit)
            saved = digests.get(name) if isinstance(digests, dict) else None
            known = self.files[paths[name]].digest  # compared when it arrived
            if saved != (known if known and len(known) == 64 else sha256(local)):
                raise LlmWsaeError(
                    f"{paths[name]} of {self._here} is not the file whose checksum its {INFO} "
                    "holds; ask whoever pushed it to push it again"
                )
        if (explanations := inside(sae_id, EXPLANATIONS)) in self.files:
            self.fetch(explanations, LARGEST_EXPLANATIONS)
        return local.parent

    def fetch(self, path: str, limit: int) -> Path:
        """A file of at most ``limit`` bytes in the local cache, compared with its checksum.

        Raises LlmWsaeError if it is larger, cannot be fetched or arrives damaged; a damaged file is
        removed from the cache, so that the next attempt fetches it again.
        """
        remote = self.files[path]
        if remote.size > limit:
            raise LlmWsaeError(
                f"{path} of {self._here} is not read: it has {remote.size:,} bytes, but at most "
                f"{limit:,} are possible"
            )
        if self.cache is not None:
            return self.cache / path
        with hub_errors(self.repo_id, self.revision):
            return self._downloaded(path, remote)

    def _downloaded(self, path: str, remote: RemoteFile) -> Path:
        """A file in the cache's folder of the commit: a link, which is made if necessary."""
        assert remote.digest is not None
        root = _cache_folder(self.repo_id)
        link = _below(root, "snapshots", self.commit, path)
        if not _holds(link, remote):
            blob = _below(root, "blobs", remote.digest)
            with open(_below(root, ".llm-wsae.lock"), "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # held until it is closed
                if not _holds(blob, remote):
                    self._download(path, remote, blob)
                link.unlink(missing_ok=True)
                link.symlink_to(os.path.relpath(blob, link.parent))
        if self.revision != self.commit:  # so that the cache can answer offline
            with contextlib.suppress(OSError):
                _below(root, "refs", self.revision or "main").write_text(self.commit)
        return link

    def _download(self, path: str, remote: RemoteFile, blob: Path) -> None:
        """Put a file's content at ``blob``; what a broken download left beside it is continued."""
        from huggingface_hub.utils import tqdm

        partial = blob.with_name(f"{blob.name}.incomplete")
        shown_as = {"total": remote.size, "unit": "B", "unit_scale": True, "desc": printable(path)}
        with open(partial, "ab") as file, tqdm(**shown_as) as bar:
            download(self.repo_id, self.commit, path, file, remote.size, bar.update)
        if not _holds(partial, remote):
            partial.unlink()
            raise LlmWsaeError(
                f"{path} of {self._here} arrived damaged: its checksum is not the one that the Hub "
                "names; run the same command again"
            )
        partial.replace(blob)

    def _largest_tensors(self, cfg_path: str) -> dict[str, int]:
        """The most bytes that the two tensor files can have, by ``cfg.json``."""
        cfg = self.read_json(cfg_path)
        d_in, d_sae = integer(cfg.get("d_in")), integer(cfg.get("d_sae"))
        if d_in is None or d_sae is None or min(d_in, d_sae) < 1:
            raise LlmWsaeError(
                f"{cfg_path} of {self._here} gives d_in = {shown(cfg.get('d_in'))} and "
                f"d_sae = {shown(cfg.get('d_sae'))}"
            )
        extras = 8 * d_in * (_MATRICES * d_in + 64)
        return {EXTRAS: extras + _HEADER, WEIGHTS: _largest_weights(d_in, d_sae)}

    @property
    def _here(self) -> str:
        name = f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id
        return name if self.cache is None else f"the local cache of {name}"


def _largest_weights(d_in: int, d_sae: int) -> int:
    """The most bytes that a file of weights can have: float64, three vectors of a gate."""
    return 8 * (2 * d_in * d_sae + d_in + 4 * d_sae) + _HEADER


def head_of(repo_id: str, revision: str | None = None) -> tuple[str, bool]:
    """The commit of a revision, or of the default branch, and whether the repository is private.

    Raises as ``ask`` does, and ValueError for a name or an answer that cannot be one.
    """
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    at = "" if revision is None else f"/revision/{quote(revision, safe='')}"
    said = mapping(ask(f"{repo_id}{at}")[0])
    return commit_of(said.get("sha")), said.get("private") is True


def remote_files(repo_id: str, commit: str) -> dict[str, RemoteFile]:
    """The files of a commit on the Hub.

    Raises LlmWsaeError if one of their paths would leave the folder or there are too many, and as
    ``ask`` does; ValueError for entries that are none.
    """
    files: dict[str, RemoteFile] = {}
    cursor: str | None = ""
    seen, until = {cursor}, time.monotonic() + _LONGEST_LIST
    while cursor is not None:
        entries, cursor = ask(f"{repo_id}/tree/{commit}", cursor or None)
        if not isinstance(entries, list):
            raise ValueError(f"the list of its files is {shown(entries)}")
        files.update(map(_entry, [one for one in entries if mapping(one).get("type") == "file"]))
        too_many = len(seen) > _MOST_PAGES or len(files) > _MOST_FILES
        if cursor in seen or too_many or time.monotonic() > until:
            raise LlmWsaeError(
                f"{repo_id} lists files without an end, or more than {_MOST_FILES:,}, or too "
                "slowly, so nothing of it is read"
            )
        seen.add(cursor)
    for path in files:
        if not all(_PART.fullmatch(part) and part not in (".", "..") for part in path.split("/")):
            raise LlmWsaeError(
                f"{repo_id} names a file {shown(path)}, which cannot be put into a folder safely, "
                "so nothing of it is read"
            )
    return files


def _entry(said: Mapping[str, Any]) -> tuple[str, RemoteFile]:
    """Path and file of an entry in the list. Raises ValueError if it is not of that form."""
    path, size = text(said.get("path")), integer(said.get("size"))
    digest = text(mapping(said.get("lfs")).get("oid", said.get("oid")))
    if path is None or size is None or size < 0 or not _DIGEST.fullmatch(digest or ""):
        raise ValueError(f"its list of files has {shown(said)}")
    return path, RemoteFile(size, digest)


def _cache_folder(repo_id: str) -> Path:
    """The folder of a repository in the client's cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name = repo_folder_name(repo_id=repo_id, repo_type="model")
    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / name


def _below(root: Path, *names: str) -> Path:
    """A path below ``root``, in a folder that is made. Raises LlmWsaeError if that is elsewhere."""
    path = root.joinpath(*names)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.resolve().is_relative_to(root):
        raise LlmWsaeError(f"{path.parent} leads out of {root}, so nothing is put there; remove it")
    return path


def digest_of(local: Path, remote: RemoteFile) -> str | None:
    """The local file's digest, of the kind that the Hub reports for the remote one."""
    from huggingface_hub.utils.sha import git_hash

    if remote.digest is None:
        return None
    return sha256(local) if len(remote.digest) == 64 else git_hash(local.read_bytes())


def _holds(path: Path, remote: RemoteFile) -> bool:
    return path.is_file() and digest_of(path, remote) == remote.digest


def inside(sae_id: str, name: str) -> str:
    """The path in a repository of a dictionary's file; "." is the repository itself."""
    return str(PurePosixPath(sae_id) / name)


def _cached(repo_id: str, revision: str | None) -> Repository | None:
    """What the local cache has of a revision."""
    root = _cache_folder(repo_id)
    try:
        named = root / "refs" / (revision or "main")
        commit = named.read_text().strip() if named.is_file() else revision or ""
        folder = root / "snapshots" / commit_of(commit)
        files = {
            path.relative_to(folder).as_posix(): RemoteFile(path.stat().st_size, None)
            for path in folder.rglob("*")
            if path.is_file()
        }
    except (OSError, ValueError):
        return None
    return Repository(repo_id, revision, commit, files, folder) if files else None
