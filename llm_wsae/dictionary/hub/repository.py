"""One revision of a repository of dictionaries on the Hub, or what the local cache has of it.

Neither a repository nor its server is trusted. Paths, commits and digests in the list of files are
checked before anything is fetched, and what arrives is compared with its digest in the list. (The
client's own functions name files of the cache after headers of answers.) Files are kept where the
client looks for them: ``blobs/<digest>``, ``refs/<revision>`` and links in ``snapshots/<commit>``.
"""

import dataclasses
import fcntl
import functools
import io
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from huggingface_hub import HfApi, constants, errors
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, httpx
from huggingface_hub.utils.sha import git_hash

from llm_wsae.artifact.files import sha256
from llm_wsae.dictionary.folder import CFG, EXPLANATIONS, EXTRAS, INFO, WEIGHTS, read_facts
from llm_wsae.dictionary.formats.reading import Layout, layout_of, read_config
from llm_wsae.dictionary.info import Facts
from llm_wsae.errors import LlmWsaeError, UsageError, nearest, shown
from llm_wsae.outside import check_revision, check_token, hub_is_unreachable, reason
from llm_wsae.terminal import printable, without_secrets

FILES = (INFO, CFG, EXTRAS, WEIGHTS)  # small ones first
COMMIT = re.compile(r"[0-9a-f]{40}")
_LARGEST = {".json": 16 << 20, ".md": 4 << 20, ".jsonl": 256 << 20}  # bytes; the last: 2¹⁸ latents
_MOST_FILES = 100_000
_PART = re.compile(r"(?!\.{1,2}$)[^\x00-\x1f\x7f\ud800-\udfff\\:*?\"<>|]+")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_LOGIN = "log in (`hf auth login`, or the variable HF_TOKEN)"
_AGAIN = "run the same command again"
_CHANGED = (
    f"{{repo}} was changed by someone else in the meantime, and nothing was written; {_AGAIN}"
)
_KNOWN: dict[Any, str] = {  # by class, or status
    errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, so the Hub cannot be asked about {repo}, "
    "and the local cache does not hold it; unset it",
    errors.HFValidationError: "{repo!r} cannot be the name of a repository on the Hub; give "
    "user/name",
    errors.GatedRepoError: f"{{repo}} is gated: accept its terms on the Hub and {_LOGIN}",
    errors.RevisionNotFoundError: "{repo} has no revision {revision!r}; look at its branches on "
    "the Hub",
    errors.RepositoryNotFoundError: "there is no repository {repo} on the Hub that you may see; "
    f"check the name, or {_LOGIN}",
    httpx.TransportError: "the connection to the Hub ({hub}) failed ({kind}), and nothing of "
    f"{{repo}} is half written; check the network and {_AGAIN}",
    401: f"the Hub does not accept your token, or needs one; {_LOGIN}",
    403: f"your token may not do that with {{repo}}; {_LOGIN} as someone who may",
    409: _CHANGED,
    412: _CHANGED,
}
_OTHER_STATUS = f"the Hub answered with status {{status}} about {{repo}}{{said}}; {_AGAIN} later"
_NAMES = (errors.HFValidationError, errors.RevisionNotFoundError, errors.RepositoryNotFoundError)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository."""

    size: int  # bytes
    digest: str | None  # SHA-256 if it is large, else git's id; None if only the cache was asked

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
    revision: str | None  # the branch, tag or commit asked for; None for the default branch
    commit: str
    files: Mapping[str, RemoteFile]  # by path
    is_cached: bool = False  # the Hub could not be asked, so these are the files in the cache

    @classmethod
    def open(cls, repo_id: str, revision: str | None = None) -> "Repository":
        """Ask the Hub, or the cache if it cannot be reached. Raises as ``hub_errors`` does."""
        check_revision(revision)
        with hub_errors(repo_id, revision):
            try:
                return cls.at(repo_id, revision, HfApi().model_info(repo_id, revision=revision).sha)
            except Exception as error:
                if hub_is_unreachable(error) and (cached := _cached(repo_id, revision)):
                    return cached
                raise

    @classmethod
    def at(cls, repo_id: str, revision: str | None, commit: Any) -> "Repository":
        """The files of a commit on the Hub; use it within ``hub_errors``."""
        commit = commit_of(commit)
        listed = HfApi().list_repo_tree(repo_id, recursive=True, revision=commit)
        entries = list(itertools.islice(listed, _MOST_FILES + 1))
        if len(entries) > _MOST_FILES:
            raise LlmWsaeError(f"{repo_id} lists files without an end, so nothing of it is read")
        files = dict(_entry(repo_id, one) for one in entries if isinstance(one, RepoFile))
        return cls(repo_id, revision, commit, files)

    @functools.cached_property
    def layouts(self) -> dict[str, Layout | None]:
        """The dictionaries by name, sorted: their folders, "." for the repository itself. Those of
        this package have the layout None."""
        folders: dict[str, set[str]] = {}
        for path in map(PurePosixPath, self.files):
            folders.setdefault(str(path.parent), set()).add(path.name)
        known = {name: layout_of(files) for name, files in sorted(folders.items())}
        return {name: found for name, found in known.items() if found or INFO in folders[name]}

    def wanted(self, sae_id: str | None) -> list[str]:
        """The dictionary of that name, or all of them. Raises UsageError if there is no such one,
        LlmWsaeError if there is none at all."""
        known = list(self.layouts)
        if not known:
            raise LlmWsaeError(f"{self._here} holds no dictionary of a layout that can be read")
        if sae_id is None:
            return known
        name = sae_id.strip("/") or "."
        if name not in known:
            raise UsageError(f"{self._here} has no dictionary {sae_id!r}; {nearest(name, known)}")
        return [name]

    def facts(self, sae_id: str) -> Facts:
        """What the small files of a dictionary say. Raises LlmWsaeError if one cannot be read."""
        layout = self.layouts[sae_id]
        if layout is None:
            return read_facts(self._fetched(sae_id, CFG, INFO), sae_id)
        config = read_config(self._fetched(sae_id, layout.files[0]), layout)
        found = layout.announce(config, PurePosixPath(self.repo_id, sae_id))
        return dataclasses.replace(found, sae_id=sae_id)

    def dictionary_folder(self, sae_id: str) -> Path:
        """The folder in the cache with the files of a dictionary, which ``reading.read`` judges.
        Raises LlmWsaeError if one is missing, and as ``fetch`` does."""
        layout = self.layouts[sae_id]
        names = FILES if layout is None else layout.files
        optional = (EXPLANATIONS,) if layout is None else layout.optional
        if missing := [name for name in names if inside(sae_id, name) not in self.files]:
            raise LlmWsaeError(
                f"{sae_id} of {self._here} is not a complete dictionary of this package: it lacks "
                f"{' and '.join(missing)}"
            )
        return self._fetched(sae_id, *optional, *names)

    def _fetched(self, sae_id: str, *names: str) -> Path:
        """The folder in the cache with those of a dictionary's files that there are."""
        paths = [inside(sae_id, name) for name in names]
        return [self.fetch(path) for path in paths if path in self.files][-1].parent

    def fetch(self, path: str) -> Path:
        """A file in the cache, downloaded if necessary and compared with its checksum. Raises
        LlmWsaeError if it is too large for its kind, cannot be fetched or arrives damaged."""
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
                with suppress(OSError):
                    ref.parent.mkdir(parents=True, exist_ok=True)
                    ref.write_text(self.commit)
        return link

    def _download(self, path: str, remote: RemoteFile, blob: Path) -> None:
        """Put a file's content at ``blob``; what a broken download left beside it is continued."""
        partial = blob.with_name(f"{blob.name}.incomplete")
        with _UpTo(partial, remote.size, path) as file:
            if file.tell() < remote.size:
                http_get(
                    f"{constants.ENDPOINT}/{self.repo_id}/resolve/{self.commit}/{quote(path)}",
                    file,
                    resume_size=file.tell(),
                    headers={**build_hf_headers(), "Accept-Encoding": "identity"},
                    displayed_filename=printable(path),
                )
        if not remote.is_same_as(partial):
            partial.unlink()
            raise LlmWsaeError(
                f"{path} of {self._here} arrived damaged: its checksum is not the one that the Hub "
                f"names; {_AGAIN}"
            )
        partial.replace(blob)

    @property
    def _here(self) -> str:
        name = f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id
        return f"the local cache of {name}" if self.is_cached else name


class _UpTo(io.FileIO):
    """A file that is appended to, and refuses more than it should hold."""

    def __init__(self, place: Path, size: int, path: str):
        super().__init__(place, "ab")
        self._size, self._path = size, path

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self._size:
            raise LlmWsaeError(
                f"the Hub ({constants.ENDPOINT}) sends more for {self._path} than the "
                f"{self._size:,} bytes that it lists, so it is not read"
            )
        return super().write(data)


def commit_of(value: Any) -> str:
    """The value if it is the id of a commit; it becomes the name of a folder. Or ValueError."""
    if not (isinstance(value, str) and COMMIT.fullmatch(value)):
        raise ValueError(f"{shown(value)} is not the id of a commit")
    return value


def inside(sae_id: str, name: str) -> str:
    """The path in a repository of a dictionary's file; "." is the repository itself."""
    return str(PurePosixPath(sae_id) / name)


def _entry(repo_id: str, said: RepoFile) -> tuple[str, RemoteFile]:
    digest = said.blob_id if said.lfs is None else said.lfs.sha256
    if type(said.size) is not int or said.size < 0 or not _DIGEST.fullmatch(digest):
        raise ValueError(f"its list of files has {shown(vars(said))}")
    if not all(map(_PART.fullmatch, said.path.split("/"))):
        raise LlmWsaeError(
            f"{repo_id} names a file {shown(said.path)}, which cannot be put into a folder safely, "
            "so nothing of it is read"
        )
    return said.path, RemoteFile(said.size, digest)


def _cache_folder(repo_id: str) -> Path:
    name = repo_folder_name(repo_id=repo_id, repo_type="model")
    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / name


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


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn whatever a request, or reading its answer, raises into one sentence: UsageError if the
    repository's or revision's name is wrong, else LlmWsaeError."""
    check_token()
    try:
        yield
    except (LlmWsaeError, MemoryError):
        raise
    except Exception as error:
        raise _sentence(error, repo_id, revision) from error


def _sentence(error: BaseException, repo_id: str, revision: str | None) -> LlmWsaeError:
    cause: BaseException | None = error  # the client wraps failures in failures
    while cause is not None:
        status, said = 0, ""
        if isinstance(cause, errors.HfHubHTTPError):
            status, said = cause.response.status_code, str(cause.server_message or "")
            said = f" ({without_secrets(' '.join(said.split()))[:300]})" if said else ""
        known = next((_KNOWN[k] for k in (*type(cause).__mro__, status) if k in _KNOWN), None)
        if sentence := known or (status and _OTHER_STATUS):
            words: dict[str, Any] = {"repo": repo_id, "revision": revision, "status": status}
            words |= {"hub": constants.ENDPOINT, "kind": type(cause).__name__, "said": said}
            ours = UsageError if isinstance(cause, _NAMES) else LlmWsaeError
            return ours(sentence.format(**words))
        cause = cause.__cause__ or cause.__context__
    said = without_secrets(reason(error))
    if isinstance(error, OSError):
        return LlmWsaeError(f"reading or writing files for {repo_id} failed: {said}")
    return LlmWsaeError(
        f"an answer of the Hub ({constants.ENDPOINT}) about {repo_id} cannot be used: {said}"
    )
