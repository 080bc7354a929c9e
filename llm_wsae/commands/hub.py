"""The commands of the Hub: push dictionaries, pull them, list what a repository holds."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from llm_wsae.commands import Result
from llm_wsae.errors import UsageError
from llm_wsae.pipeline.request import Flag
from llm_wsae.terminal import aligned, printable

RepoId = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REPO_ID")]


def push(
    dictionaries: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="DICT… REPO_ID")
    ],
    private: Flag = False,
    revision: str | None = None,
    license: str | None = None,
) -> Result:
    """Upload dictionaries to a repository on the Hub, with a card; only changes are uploaded.

    Args:
        dictionaries: Dictionary folders, then the repository, user/name; created if necessary.
        private: Create a private repository.
        revision: Branch to push to; a new one starts from main.
        license: Licence for the card, as the Hub names it, e.g. mit.
    """
    from llm_wsae.dictionary.folder import is_dictionary
    from llm_wsae.dictionary.hub.transfer import push as push_folders

    *names, repo_id = dictionaries or ("",)
    # The parser cannot take the last word apart itself.
    if not names or is_dictionary(Path(repo_id)):
        raise UsageError("name dictionary folders and then the repository: DICT … user/name")
    folders = [Path(name) for name in names]
    done = push_folders(folders, repo_id, private=private, revision=revision, license=license)
    facts: dict[str, Any] = {"repo_id": repo_id, "url": done.url, "commit": done.commit}
    facts |= {"dictionaries": done.sae_ids, "changed": done.changed}
    url = printable(done.url)
    if not done.changed:
        return facts, f"already up to date: {url}"
    return facts, "\n".join([*(f"  {path}" for path in done.changed), f"pushed to {url}"])


def pull(
    repo_id: RepoId,
    sae_id: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[SAE_ID]")] = None,
    *,
    out: Path = Path("dictionaries"),
    revision: str | None = None,
) -> Result:
    """Download dictionaries from a repository on the Hub, check them, and copy them into a folder.

    Args:
        repo_id: Repository, user/name.
        sae_id: Dictionary in it, <site>/<name>; all of them by default.
        out: Folder that receives <site>/<name>.
        revision: Branch, tag or commit.
    """
    from llm_wsae.dictionary.hub.transfer import pull as pull_folders

    folders = pull_folders(repo_id, out, sae_id, revision=revision)
    facts = {"repo_id": repo_id, "folders": {name: str(path) for name, path in folders.items()}}
    return facts, "\n".join(printable(str(path)) for path in folders.values())


def list_repository(repo_id: RepoId, revision: str | None = None) -> Result:
    """List the dictionaries in a repository on the Hub, with their measurements.

    Args:
        repo_id: Repository, user/name.
        revision: Branch, tag or commit.
    """
    from llm_wsae.dictionary.hub.transfer import list_dictionaries

    found = list_dictionaries(repo_id, revision=revision)
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
    return {"repo_id": repo_id, "dictionaries": rows}, aligned(table)
