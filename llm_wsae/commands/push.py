"""The command that puts dictionaries on the Hub."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from llm_wsae.commands.options import Flag, Result
from llm_wsae.errors import UsageError


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

    *folders, repo_id = dictionaries or ("",)
    # The parser cannot take the last word apart itself.
    if not folders or is_dictionary(Path(repo_id)):
        raise UsageError("name dictionary folders and then the repository: DICT … user/name")
    done = push_folders(
        [Path(folder) for folder in folders],
        repo_id,
        private=private,
        revision=revision,
        license=license,
    )
    facts: dict[str, Any] = {"repo_id": repo_id, "url": done.url, "commit": done.commit}
    facts |= {"dictionaries": done.sae_ids, "changed": done.changed}
    if not done.changed:
        return facts, f"already up to date: {done.url}"
    return facts, "\n".join([*(f"  {path}" for path in done.changed), f"pushed to {done.url}"])
