"""The command that checks every byte."""

from pathlib import Path
from typing import Annotated

import tyro

from llm_wsae.commands.options import Result
from llm_wsae.errors import LlmWsaeError


def verify(
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")],
    site: str | None = None,
) -> Result:
    """Check every byte of an activation store or a dictionary, and name what is damaged.

    Args:
        folder: Store or dictionary folder; also another tool's dictionary (without checksums).
        site: Site of a dictionary whose files do not name it.
    """
    from llm_wsae.data.manifest import MANIFEST
    from llm_wsae.data.verify import verify_store
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.dictionary.explanations import read_explanations
    from llm_wsae.dictionary.folder import CFG, INFO
    from llm_wsae.dictionary.formats.reading import layout_of

    if not folder.is_dir():
        raise LlmWsaeError(f"there is no folder {folder}")
    names = {entry.name for entry in folder.iterdir()}
    if MANIFEST in names:
        kind, problems = "store", verify_store(folder)
        if problems:
            raise LlmWsaeError("; ".join(problems))
    elif names & {CFG, INFO} or layout_of(names):
        kind = "dictionary"
        Dictionary.load(folder, site=site)
        if INFO in names:
            read_explanations(folder)
    else:
        raise LlmWsaeError(
            f"{folder} is neither an activation store (with a {MANIFEST}) nor a dictionary (with "
            f"a {CFG})"
        )
    return {"folder": str(folder), "kind": kind, "ok": True}, f"{folder}: {kind} is intact"
