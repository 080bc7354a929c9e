"""The command that checks every byte."""

from pathlib import Path

import tyro

from llm_wsae.commands.common import Result
from llm_wsae.errors import LlmWsaeError


def verify(folder: tyro.conf.Positional[Path]) -> Result:
    """Check every byte of an activation store or a dictionary, and name what is damaged.

    Args:
        folder: Store or dictionary folder.
    """
    from llm_wsae.data.manifest import MANIFEST
    from llm_wsae.data.verify import verify_store
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.dictionary.files import CFG, INFO

    if not folder.is_dir():
        raise LlmWsaeError(f"there is no folder {folder}")
    if (folder / MANIFEST).exists():
        kind, problems = "store", verify_store(folder)
        if problems:
            raise LlmWsaeError("; ".join(problems))
    elif (folder / CFG).exists() or (folder / INFO).exists():
        kind = "dictionary"
        Dictionary.load(folder)
    else:
        raise LlmWsaeError(
            f"{folder} is neither an activation store (with a {MANIFEST}) nor a dictionary (with "
            f"a {CFG})"
        )
    return {"folder": str(folder), "kind": kind, "ok": True}, f"{folder}: {kind} is whole"
