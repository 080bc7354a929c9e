"""The project's pretrained dictionaries, by name.

They are in ``checkpoints/`` of the project's repository, ``<model>/<site>/<dictionary>``, listed in
its README.md. They are too large for an installed package: there they are read from a clone that
contains the current folder, or from a repository on the Hub.
"""

from pathlib import Path

import torch

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.folder import INFO, is_dictionary
from llm_wsae.errors import LlmWsaeError, UsageError, nearest

_FOLDER = "checkpoints"
_PACKAGE = Path(__file__).parents[1]


def load_pretrained(
    name: str,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    device: torch.device | str = "cpu",
) -> Dictionary:
    """Open a pretrained dictionary: ``smollm2-135m/blocks.9.hook_resid_post/uniform-k32``.

    Without ``repo_id``, it is read from ``checkpoints/`` of the clone of llm-wsae that the package
    runs from (an editable installation) or that contains the current folder; nothing is downloaded.
    With ``repo_id``, it is read from a repository on the Hub that holds the dictionaries of this
    model; there the model's name is dropped.

    Raises UsageError for an unknown name, LlmWsaeError if there is no clone, and as
    ``Dictionary.load`` and ``Dictionary.from_pretrained`` do.
    """
    if repo_id is not None:
        sae_id = name.partition("/")[2] or name
        return Dictionary.from_pretrained(repo_id, sae_id, revision=revision, device=device)
    if revision is not None:
        raise UsageError("a revision needs a repository on the Hub; name it with repo_id")
    known = _known()
    if not known:
        raise LlmWsaeError(
            f"there are no pretrained dictionaries here: they are in {_FOLDER}/ of llm-wsae's "
            "repository, not in the installed package; work in a clone of it, or name a "
            "repository on the Hub that holds them with repo_id"
        )
    if name not in known:
        raise UsageError(f"there is no pretrained dictionary {name!r}; {nearest(name, known)}")
    return Dictionary.load(known[name], device=device)


def _known() -> dict[str, Path]:
    """The folders of the pretrained dictionaries by name, from the nearest clone that has any."""
    here = Path.cwd()
    for clone in (_PACKAGE.parent, here, *here.parents):
        # Any project may have a folder of that name: this one's is next to the package's.
        if not (clone / _PACKAGE.name / "__init__.py").is_file():
            continue
        root = clone / _FOLDER
        found = {
            path.parent.relative_to(root).as_posix(): path.parent
            for path in sorted(root.glob(f"*/*/*/{INFO}"))
            if is_dictionary(path.parent)
        }
        if found:
            return found
    return {}
