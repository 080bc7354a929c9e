"""Reading a dictionary folder, whichever tool wrote it.

File names identify the layout, here and in a repository's listing. A folder in this package's own
layout is read by ``folder.read_folder`` and nothing else.
"""

import dataclasses
from collections.abc import Collection
from pathlib import Path, PurePath

from llm_wsae.artifact.files import read_json
from llm_wsae.dictionary.atomic_folder import restore
from llm_wsae.dictionary.folder import (
    EXTRAS,
    INFO,
    Content,
    check_finite,
    not_there,
    read_folder,
)
from llm_wsae.dictionary.formats import dictionary_learning, saelens, sparsify
from llm_wsae.dictionary.formats.layout import Layout
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.model.site import Site
from llm_wsae.outside import reason

LAYOUTS = (saelens.LAYOUT, sparsify.LAYOUT, dictionary_learning.LAYOUT)


def is_own(names: Collection[str]) -> bool:
    """Whether files of these names are a dictionary of this package, or part of one."""
    return INFO in names or EXTRAS in names


def layout_of(names: Collection[str]) -> Layout | None:
    """The foreign layout of a folder with files of these names, if it has one."""
    if is_own(names):
        return None
    return next((layout for layout in LAYOUTS if set(layout.files) <= set(names)), None)


def read(folder: Path, site: str | None = None) -> Content:
    """The dictionary in a folder, whichever tool wrote it.

    ``site`` gives its site if neither its files nor the folder's name do. Raises UsageError if they
    name another site, LlmWsaeError if the folder has no known layout, its reader refuses it, or it
    does not belong to the residual stream.
    """
    restore(folder)
    if not folder.is_dir():
        raise not_there(folder)
    try:
        names = {entry.name for entry in folder.iterdir()}
        layout = layout_of(names)
        if layout is not None:
            return _read_foreign(folder, layout, site)
        if not is_own(names):
            raise _unknown(folder, names)
        content = read_folder(folder)
    except OSError as error:
        raise LlmWsaeError(
            f"{folder} cannot be read: {reason(error)}; check it, and try again"
        ) from error
    _check_site(folder, content.info.site, site)
    return content


def _read_foreign(folder: Path, layout: Layout, site: str | None) -> Content:
    config = read_json(folder / layout.config, f"{layout.name} configuration")
    if not isinstance(config, dict):
        raise LlmWsaeError(f"{folder / layout.config} should be a JSON object")
    said = layout.announce(config, PurePath(folder.absolute()))
    if not (said.info.site or site):
        raise LlmWsaeError(
            f"{folder} holds a dictionary of {layout.name} that does not say where it belongs; "
            'load it in Python with site="blocks.N.hook_resid_post" and save it'
        )
    info = dataclasses.replace(said.info, site=said.info.site or site or "")
    try:
        Site.parse(info.site)
    except UsageError as error:
        raise LlmWsaeError(
            f"{folder} holds a dictionary of {layout.name} that cannot be used: {error}"
        ) from None
    _check_site(folder, info.site, site)
    weights, sparsity = layout.read(folder, config, said)
    check_finite(weights, f"{folder}, after folding")
    return Content(weights, sparsity, info, {})


def _check_site(folder: Path, said: str, asked: str | None) -> None:
    if asked not in (None, said):
        raise UsageError(f"{folder} says that it belongs to {said}, not to {asked}")


def _unknown(folder: Path, names: Collection[str]) -> LlmWsaeError:
    for layout in LAYOUTS:
        if layout.weights in names:
            return LlmWsaeError(
                f"{folder} looks like a dictionary of {layout.name}, but lacks {layout.config}"
            )
    return LlmWsaeError(
        f"{folder} holds {', '.join(sorted(names)[:4]) or 'nothing'} and no dictionary that can be "
        "read: known layouts are llm-wsae (cfg.json, sae_weights.safetensors, wsae.json and "
        f"wsae.safetensors), {', '.join(map(str, LAYOUTS))}"
    )
