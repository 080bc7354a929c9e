"""The commands of the Hub: push dictionaries, pull them, list what a repository holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from llm_wsae.commands import Result
from llm_wsae.errors import UsageError
from llm_wsae.pipeline.request import Flag
from llm_wsae.terminal import aligned, printable

Words = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="DICT… REPO_ID")]
RepoId = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REPO_ID")]
_BOTH = "name dictionary folders and then the repository: DICT … user/name"


@dataclass(frozen=True, kw_only=True)
class Push:
    dictionaries: Words
    """Dictionary folders, then the repository, user/name; created if necessary."""
    private: Flag = False
    """Create a private repository."""
    revision: str | None = None
    """Branch to push to; a new one starts from main."""
    license: str | None = None
    """Licence for the card, as the Hub names it, e.g. mit."""

    def __post_init__(self) -> None:
        if len(self.dictionaries) < 2:
            raise UsageError(_BOTH)


def push(request: Push) -> Result:
    """Upload dictionaries to a repository on the Hub, with a card; only changes are uploaded."""
    from llm_wsae.dictionary.folder import is_dictionary
    from llm_wsae.dictionary.hub.transfer import push as push_folders

    *names, repo_id = request.dictionaries  # the parser cannot take the last word apart itself
    if is_dictionary(Path(repo_id)):
        raise UsageError(_BOTH)
    how: dict[str, Any] = {"private": request.private, "license": request.license}
    done = push_folders([Path(name) for name in names], repo_id, revision=request.revision, **how)
    facts: dict[str, Any] = {"repo_id": repo_id, "url": done.url, "commit": done.commit}
    facts |= {"dictionaries": done.sae_ids, "changed": done.changed}
    url = printable(done.url)
    if not done.changed:
        return facts, f"already up to date: {url}"
    return facts, "\n".join([*(f"  {path}" for path in done.changed), f"pushed to {url}"])


@dataclass(frozen=True, kw_only=True)
class Pull:
    repo_id: RepoId
    """Repository, user/name."""
    sae_id: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[SAE_ID]")] = None
    """Dictionary in it, <site>/<name>; all of them by default."""
    out: Path = Path("dictionaries")
    """Folder that receives <site>/<name>."""
    revision: str | None = None
    """Branch, tag or commit."""


def pull(request: Pull) -> Result:
    """Download dictionaries from the Hub, check them, and copy them into a folder."""
    from llm_wsae.dictionary.hub.transfer import pull as pull_folders

    repo_id, revision = request.repo_id, request.revision
    folders = pull_folders(repo_id, request.out, request.sae_id, revision=revision)
    facts = {"repo_id": repo_id, "folders": {name: str(path) for name, path in folders.items()}}
    return facts, "\n".join(printable(str(path)) for path in folders.values())


@dataclass(frozen=True, kw_only=True)
class List:
    repo_id: RepoId
    """Repository, user/name."""
    revision: str | None = None
    """Branch, tag or commit."""


def list_repository(request: List) -> Result:
    """List the dictionaries in a repository on the Hub, with their measurements."""
    from llm_wsae.dictionary.hub.transfer import list_dictionaries

    found = list_dictionaries(request.repo_id, revision=request.revision)
    table = [["dictionary", "size", "sparsity", "FVU", "CE recovered"]]
    for d in found:
        metrics = [d.metric(name) for name in ("fvu", "ce_recovered")]
        numbers = ["—" if value is None else f"{value:.3f}" for value in metrics]
        size = f"{d.d_in or '?'} → {d.d_sae or '?'}"
        table.append([printable(d.sae_id), size, printable(d.sparsity), *numbers])
    own = ("sae_id", "d_in", "d_sae", "sparsity", "k", "model", "corpus")
    info = ("site", "rule", "alpha", "metrics")
    rows = [
        {name: getattr(d, name) for name in own} | {name: getattr(d.info, name) for name in info}
        for d in found
    ]
    return {"repo_id": request.repo_id, "dictionaries": rows}, aligned(table)
