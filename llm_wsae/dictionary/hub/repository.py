"""One revision of a repository of dictionaries on the Hub, or what the local cache has of it.

Nothing in a repository is trusted. Its list of files is checked before anything is fetched: a path
that leaves the folder is refused, and only files of a dictionary (in this package's layout or a
known foreign one) are ever downloaded, JSON up to a fixed size, tensors up to the size that the
configuration announces. What arrives is compared with the Hub's checksum (the client compares sizes
only) and, in this package's layout, with the one in ``wsae.json``.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llm_wsae.dictionary.folder import CFG, EXPLANATIONS, EXTRAS, INFO, WEIGHTS
from llm_wsae.dictionary.formats.layout import Announced, Layout
from llm_wsae.dictionary.formats.reading import layout_of
from llm_wsae.dictionary.hub.errors import hub_errors
from llm_wsae.errors import LlmWsaeError, UsageError, nearest, shown
from llm_wsae.files import read_json, sha256
from llm_wsae.outside import check_revision, hub_is_unreachable, integer

FILES = (INFO, CFG, EXTRAS, WEIGHTS)  # small ones first
README = "README.md"
LARGEST_JSON = 16 << 20
LARGEST_EXPLANATIONS = 256 << 20  # a line of 1 kB for each of 2¹⁸ latents
_HEADER = 1 << 20  # bytes of a safetensors header, far more than needed
_MATRICES = 4  # of d_in × d_in numbers in the side tensors, at most
_WIDEST = 1 << 15  # dimensions of a residual stream, where a layout does not announce them
_MOST_LATENTS = 1 << 20
_TIMEOUT = 30  # seconds in which the Hub must begin its answer
_PART = re.compile(r"[^\x00-\x1f\\:*?\"<>|]+")


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
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils import httpx

        check_revision(revision)
        with hub_errors(repo_id, revision):
            try:
                api = HfApi()
                found = api.model_info(repo_id, revision=revision, timeout=_TIMEOUT)
                assert found.sha is not None
                return cls(repo_id, revision, found.sha, remote_files(repo_id, found.sha), None)
            except (httpx.HTTPError, OfflineModeIsEnabled) as error:
                cached = _cached(repo_id, revision)
                if cached is None or not hub_is_unreachable(error):
                    raise
                return cached

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

    def sae_ids(self, own: bool = False) -> list[str]:
        """Names of the dictionaries; with ``own`` only those in this package's layout."""
        return [name for name, layout in self.layouts.items() if layout is None or not own]

    def wanted(self, sae_id: str | None) -> list[str]:
        """The dictionary of that name, or all of them.

        Raises UsageError, suggesting the nearest name, if there is no such dictionary; LlmWsaeError
        if there is none at all.
        """
        known = self.sae_ids()
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
        config = self.read_json(inside(sae_id, layout.config)) if layout.config else {}
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
        from huggingface_hub import hf_hub_download

        # One file of each dictionary is asked for by the name of the revision, so that the cache
        # remembers which commit that was and can answer offline.
        layout = self.layouts.get(str(PurePosixPath(path).parent))
        first = INFO if layout is None else layout.files[0]
        named = self.revision if PurePosixPath(path).name == first else self.commit
        with hub_errors(self.repo_id, self.revision):
            local = Path(hf_hub_download(self.repo_id, path, revision=named))
            if self.commit not in local.parts:  # the branch moved since
                local = Path(hf_hub_download(self.repo_id, path, revision=self.commit))
        if digest_of(local, remote) != remote.digest:
            local.resolve().unlink(missing_ok=True)
            local.unlink(missing_ok=True)
            raise LlmWsaeError(
                f"{path} of {self._here} arrived damaged: its checksum is not the one that the Hub "
                "names; run the same command again"
            )
        return local

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


def remote_files(repo_id: str, commit: str) -> dict[str, RemoteFile]:
    """The files of a commit on the Hub.

    Raises LlmWsaeError if one of their paths would leave the folder, and what the client raises.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    entries = HfApi().list_repo_tree(repo_id, recursive=True, revision=commit)
    files = {
        entry.path: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in entries
        if isinstance(entry, RepoFile)
    }
    for path in files:
        if not all(_PART.fullmatch(part) and part not in (".", "..") for part in path.split("/")):
            raise LlmWsaeError(
                f"{repo_id} names a file {path!r}, which cannot be put into a folder safely, so "
                "nothing of it is read"
            )
    return files


def digest_of(local: Path, remote: RemoteFile) -> str | None:
    """The local file's digest, of the kind that the Hub reports for the remote one."""
    from huggingface_hub.utils.sha import git_hash

    if remote.digest is None:
        return None
    return sha256(local) if len(remote.digest) == 64 else git_hash(local.read_bytes())


def inside(sae_id: str, name: str) -> str:
    """The path in a repository of a dictionary's file; "." is the repository itself."""
    return str(PurePosixPath(sae_id) / name)


def _cached(repo_id: str, revision: str | None) -> Repository | None:
    """What the local cache has of a revision."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = Path(
            snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[])
        )
    except LocalEntryNotFoundError:
        return None
    files = {
        path.relative_to(snapshot).as_posix(): RemoteFile(path.stat().st_size, None)
        for path in snapshot.rglob("*")
        if path.is_file()
    }
    return Repository(repo_id, revision, snapshot.name, files, snapshot)
