"""Reading a dictionary folder, whichever tool wrote it.

The names of its files tell, here and in a repository's listing.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

from llm_wsae.artifact.files import read_json
from llm_wsae.dictionary.folder import (
    CFG,
    EXTRAS,
    INFO,
    WEIGHTS,
    Content,
    check_finite,
    files_in,
    naming,
    read_folder,
)
from llm_wsae.dictionary.formats import dictionary_learning, saelens, sparsify
from llm_wsae.dictionary.info import Facts
from llm_wsae.dictionary.sparsity import kind_of, sparsity_of
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.outside import reason


@dataclass(frozen=True)
class Layout:
    """How another tool stores a dictionary in files."""

    name: str  # the tool's
    files: tuple[str, str]  # its JSON file, its file of tensors
    announce: Callable[[Mapping[str, Any], PurePath], Facts]  # from the JSON and the folder's path
    read: Callable[[Path, Mapping[str, Any], Facts], dict[str, Tensor]]  # folded
    optional: tuple[str, ...] = ()  # small files that are read too where they exist


LAYOUTS = (
    Layout("SAELens", (CFG, WEIGHTS), saelens.announce, saelens.read, (saelens.SCALER,)),
    Layout("sparsify", (CFG, sparsify.WEIGHTS), sparsify.announce, sparsify.read),
    Layout(
        "dictionary_learning",
        (dictionary_learning.CONFIG, dictionary_learning.WEIGHTS),
        dictionary_learning.announce,
        dictionary_learning.read,
    ),
)


def is_own(names: Collection[str]) -> bool:
    """Whether files of these names are a dictionary of this package, or part of one."""
    return INFO in names or EXTRAS in names


def layout_of(names: Collection[str]) -> Layout | None:
    """The foreign layout of a folder with files of these names, if it has one."""
    if is_own(names):
        return None
    return next((layout for layout in LAYOUTS if set(layout.files) <= set(names)), None)


def read(folder: Path, site: str | None = None) -> Content:
    """The dictionary in a folder, whichever tool wrote it; ``site`` is for one that does not name
    its own. Raises UsageError if it names another site, LlmWsaeError if it cannot be read."""
    try:
        names = files_in(folder)
        layout = layout_of(names)
        if layout is None and not is_own(names):
            known = ", ".join(f"{one.name} ({' and '.join(one.files)})" for one in LAYOUTS)
            raise LlmWsaeError(
                f"{folder} holds {', '.join(sorted(names)[:4]) or 'nothing'} and no dictionary "
                f"that can be read: known layouts are llm-wsae ({CFG}, {WEIGHTS}, {INFO} and "
                f"{EXTRAS}), {known}"
            )
        content = read_folder(folder) if layout is None else _read_foreign(folder, layout, site)
    except OSError as error:
        raise LlmWsaeError(
            f"{folder} cannot be read: {reason(error)}; check it, and try again"
        ) from error
    if site not in (None, content.info.site):
        raise UsageError(f"{folder} says that it belongs to {content.info.site}, not to {site}")
    return content


def read_config(folder: Path, layout: Layout) -> dict[str, Any]:
    """The tool's configuration. Raises LlmWsaeError if it is not a JSON object."""
    path = folder / layout.files[0]
    config = read_json(path, f"{layout.name} configuration")
    if not isinstance(config, dict):
        raise LlmWsaeError(f"{path} should be a JSON object")
    return config


def _read_foreign(folder: Path, layout: Layout, site: str | None) -> Content:
    path, config = folder / layout.files[0], read_config(folder, layout)
    said = layout.announce(config, PurePath(folder.absolute()))
    info = dataclasses.replace(said.info, site=said.info.site or site or "")
    if not info.site:
        raise LlmWsaeError(
            f"{folder} holds a dictionary of {layout.name} that does not say where it belongs; "
            'load it in Python with site="blocks.N.hook_resid_post" and save it'
        )
    d_in, d_sae, k = said.d_in or 0, said.d_sae or 0, said.k or 0
    if min(d_in, d_sae) < 1 or k > d_sae:
        raise LlmWsaeError(
            f"{path} gives {said.d_in} dimensions, {said.d_sae} latents and k = {said.k}, so it "
            "does not describe a dictionary"
        )
    weights = layout.read(folder, config, said)
    check_finite(weights, f"{folder}, after folding")
    kind, _ = kind_of(said.architecture, is_transcoder=True)
    kind = "jumprelu" if "threshold" in weights else kind
    with naming(path):
        return Content(weights, sparsity_of(kind, said.k), info, {})
