"""One revision of a repository of dictionaries on the Hub, or what the local cache has of it.

A repository is not trusted. Paths in its list of files are checked before anything is fetched, only
files of a dictionary (in this package's layout or a known foreign one) are downloaded, by the Hub's
client into its cache, and reading compares what arrives with the dictionary's own checksums.
"""

import dataclasses
import functools
import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, errors, snapshot_download
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import httpx
from huggingface_hub.utils.sha import git_hash

from llm_wsae.artifact.files import read_json, sha256
from llm_wsae.dictionary.folder import CFG, EXPLANATIONS, EXTRAS, INFO, WEIGHTS
from llm_wsae.dictionary.formats.layout import Layout
from llm_wsae.dictionary.formats.reading import LAYOUTS, layout_of
from llm_wsae.dictionary.info import Facts
from llm_wsae.errors import LlmWsaeError, UsageError, nearest, shown
from llm_wsae.outside import check_revision, check_token, hub_is_unreachable, reason
from llm_wsae.terminal import without_secrets

FILES = (INFO, CFG, EXTRAS, WEIGHTS)
_LARGEST = {".json": 16 << 20, ".md": 4 << 20, ".jsonl": 256 << 20}  # bytes; the last: 2¹⁸ latents
_PART = re.compile(r"(?!\.{1,2}$)[^\x00-\x1f\x7f\ud800-\udfff\\:*?\"<>|]+")
_LOGIN = "log in (`hf auth login`, or the variable HF_TOKEN)"
_AGAIN = "run the same command again"
_KNOWN: dict[Any, str] = {  # the first class that fits
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
}
_NAMES = (errors.HFValidationError, errors.RevisionNotFoundError, errors.RepositoryNotFoundError)
_CHANGED = (
    f"{{repo}} was changed by someone else in the meantime, and nothing was written; {_AGAIN}"
)
_BY_STATUS = {
    401: f"the Hub does not accept your token, or needs one; {_LOGIN}",
    403: f"your token may not do that with {{repo}}; {_LOGIN} as someone who may",
    409: _CHANGED,
    412: _CHANGED,
}


@dataclass(frozen=True)
class Repository:
    """The files of one commit."""

    repo_id: str
    """``user/name``."""
    revision: str | None
    """The branch, tag or commit; None for the default branch."""
    files: Mapping[str, RepoFile | None]
    """By path in the repository; what the Hub says of each."""
    cached: Path | None = None
    """The folder of the cache, if the Hub could not be asked."""

    @classmethod
    def open(cls, repo_id: str, revision: str | None = None) -> "Repository":
        """Ask the Hub, or the local cache if the Hub cannot be reached. Raises as ``hub_errors``
        does."""
        check_revision(revision)
        with hub_errors(repo_id, revision):
            try:
                return cls.listed(repo_id, revision)
            except Exception as error:
                if hub_is_unreachable(error) and (cached := _cached(repo_id, revision)):
                    return cached
                raise

    @classmethod
    def listed(cls, repo_id: str, revision: str | None) -> "Repository":
        """What the Hub lists; use it within ``hub_errors``."""
        listed = HfApi().list_repo_tree(repo_id, recursive=True, revision=revision)
        files = {one.path: one for one in listed if isinstance(one, RepoFile)}
        for path in files:
            if not all(map(_PART.fullmatch, path.split("/"))):
                raise LlmWsaeError(
                    f"{repo_id} names a file {shown(path)}, which cannot be put into a folder "
                    "safely, so nothing of it is read"
                )
        return cls(repo_id, revision, files)

    @functools.cached_property
    def layouts(self) -> dict[str, Layout | None]:
        """The dictionaries by name, sorted: their folders, "." for the repository itself. This
        package's own have the layout None."""
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
        if layout := self.layouts[sae_id]:
            place = PurePosixPath(self.repo_id, sae_id)
            found = layout.announce(self._json(sae_id, layout.config), place)
            return dataclasses.replace(found, sae_id=sae_id)
        cfg = self._json(sae_id, CFG) if inside(sae_id, CFG) in self.files else {}
        info = self._json(sae_id, INFO)
        try:
            return Facts.own(sae_id, cfg, info)
        except LlmWsaeError as error:
            raise LlmWsaeError(f"{inside(sae_id, INFO)} of {self._here}: {error}") from None

    def _json(self, sae_id: str, name: str) -> dict[str, Any]:
        path = inside(sae_id, name)
        value = read_json(self._configurations / path, f"{path} of {self._here}")
        if not isinstance(value, dict):
            raise LlmWsaeError(f"{path} of {self._here} is not a JSON object")
        return value

    @functools.cached_property
    def _configurations(self) -> Path:
        """Where the small files of all dictionaries are."""
        names = {INFO, *(layout.config for layout in LAYOUTS)}
        places = [(path, PurePosixPath(path)) for path in self.files]
        return self.fetch(
            [path for path, p in places if p.name in names and str(p.parent) in self.layouts]
        )

    def dictionary_folder(self, sae_id: str, *, again: bool = False) -> Path:
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
        paths = [inside(sae_id, name) for name in (*names, *optional)]
        return self.fetch([path for path in paths if path in self.files], again) / sae_id

    def fetch(self, paths: Sequence[str], again: bool = False) -> Path:
        """The folder of the cache with these files; those that it lacks are downloaded, or all of
        them ``again``. Raises LlmWsaeError if one is too large for its kind, or as ``hub_errors``.
        """
        for path in paths:
            size, limit = getattr(self.files[path], "size", 0), _LARGEST.get(Path(path).suffix)
            if limit is not None and size > limit:
                raise LlmWsaeError(
                    f"{path} of {self._here} is not read: it has {size:,} bytes, but at most "
                    f"{limit:,} are possible"
                )
        if self.cached is not None:
            return self.cached
        with hub_errors(self.repo_id, self.revision):
            patterns = [glob.escape(path) for path in paths]
            given: dict[str, Any] = {"allow_patterns": patterns, "force_download": again}
            return Path(snapshot_download(self.repo_id, revision=self.revision, **given))

    @property
    def _here(self) -> str:
        name = f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id
        return f"the local cache of {name}" if self.cached else name


def is_same(there: RepoFile | None, path: Path) -> bool:
    """Whether a local file has the content of one on the Hub: by SHA-256 if that is large, by git's
    id if it is small."""
    if there is None or not path.is_file():
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == sha256(path)
    return there.blob_id == git_hash(path.read_bytes())


def inside(sae_id: str, name: str) -> str:
    """The path in a repository of a dictionary's file; "." is the repository itself."""
    return str(PurePosixPath(sae_id) / name)


def _cached(repo_id: str, revision: str | None) -> Repository | None:
    """What the local cache has of a revision."""
    root = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")
    named = root / "refs" / (revision or "main")
    commit = named.read_text().strip() if named.is_file() else revision or "none"
    folder = root / "snapshots" / commit
    found = [path for path in folder.rglob("*") if path.is_file()]
    files = dict.fromkeys(path.relative_to(folder).as_posix() for path in found)
    return Repository(repo_id, revision, files, folder) if files else None


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn every failure inside the block into one sentence. Keep it to requests, and to what reads
    answers: a server that answers oddly makes the client raise anything.

    Raises UsageError when a name is wrong (repository, revision), LlmWsaeError for everything else:
    no access, no network, a failing server, a full disk.
    """
    check_token()
    try:
        yield
    except (LlmWsaeError, MemoryError):
        raise
    except Exception as error:
        raise _sentence(error, repo_id, revision) from error


def _sentence(error: BaseException, repo_id: str, revision: str | None) -> LlmWsaeError:
    """The client wraps failures in failures, so the causes are searched for one that is known."""
    known = {"repo": repo_id, "revision": revision, "hub": constants.ENDPOINT}
    cause: BaseException | None = error
    while cause is not None:
        for kind, sentence in _KNOWN.items():
            if isinstance(cause, kind):
                ours = UsageError if isinstance(cause, _NAMES) else LlmWsaeError
                return ours(sentence.format(**known, kind=type(cause).__name__))
        if isinstance(cause, errors.HfHubHTTPError):
            status, said = cause.response.status_code, str(cause.server_message or "")
            said = f" ({without_secrets(' '.join(said.split()))[:300]})" if said else ""
            other = f"the Hub answered with status {status} about {{repo}}{{said}}; {_AGAIN} later"
            return LlmWsaeError(_BY_STATUS.get(status, other).format(**known, said=said))
        cause = cause.__cause__ or cause.__context__
    said = without_secrets(reason(error))
    if isinstance(error, OSError):
        return LlmWsaeError(f"reading or writing files for {repo_id} failed: {said}")
    return LlmWsaeError(
        f"an answer of the Hub ({constants.ENDPOINT}) about {repo_id} cannot be used: {said}"
    )
