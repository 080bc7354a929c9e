"""The command that checks every byte."""

from pathlib import Path
from typing import Annotated

import tyro

from llm_wsae.commands.options import Result
from llm_wsae.errors import LlmWsaeError

_NAMED = 3  # files without a digest that people are told of; --json names all


def verify(
    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH")],
    site: str | None = None,
) -> Result:
    """Check every byte of what llm-wsae wrote, and name what is damaged and what to do.

    Args:
        path: Store, dictionary, folder of a training, study or run, weights file, or
            JSON record; also another tool's dictionary, which has no checksums.
        site: Site of a dictionary whose files do not name it.
    """
    from llm_wsae.commands import verifying

    found = verifying.verify(path, site)
    if found.problems:
        raise LlmWsaeError("; ".join(found.problems))
    below = path if path.is_dir() else path.parent
    names = [str(file.relative_to(below)) for file in found.without_digest]
    facts = {"folder": str(path), "kind": found.kind, "ok": True, "without_digest": names}
    if not found.without_digest:
        return facts, f"{path}: {found.kind} is intact"
    shown = ", ".join(names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return facts, (
        f"{path}: {found.kind} can be read, but there is no checksum of {shown}{more}, which "
        "another tool wrote"
    )
