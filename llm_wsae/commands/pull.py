"""The command that fetches dictionaries from the Hub."""

from pathlib import Path
from typing import Annotated

import tyro

from llm_wsae.commands.options import RepoId, Result
from llm_wsae.outputs import check_file, is_record_of
from llm_wsae.provenance import write_record
from llm_wsae.terminal import printable


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
    from llm_wsae.dictionary.hub.transfer import RECORD
    from llm_wsae.dictionary.hub.transfer import pull as pull_folders

    check_file(out / RECORD, is_record_of("pull"))
    folders = pull_folders(repo_id, out, sae_id, revision=revision)
    asked = {"repo_id": repo_id, "sae_id": sae_id, "revision": revision}
    write_record(out / RECORD, "pull", {**asked, "dictionaries": list(folders)})
    facts = {"repo_id": repo_id, "folders": {name: str(path) for name, path in folders.items()}}
    return facts, "\n".join(printable(str(path)) for path in folders.values())
