"""Reading a dictionary folder, whichever tool wrote it.

File names identify the layout, here and in a repository's listing. A folder in this package's own
layout is read by ``folder.read_folder`` and nothing else.
"""

from collections.abc import Collection
from pathlib import Path, PurePath

from llm_wsae.artifact.files import read_json
from llm_wsae.dictionary.atomic_folder import not_there, retry_if_replaced
from llm_wsae.dictionary.checks import check_finite
from llm_wsae.dictionary.folder import EXTRAS, INFO, Content, read_folder
from llm_wsae.dictionary.formats import dictionary_learning, saelens, sparsify
from llm_wsae.dictionary.formats.layout import Announced, Layout
from llm_wsae.dictionary.info import CENTRED, DictionaryInfo
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.model.site import Site

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
    return retry_if_replaced(folder, lambda: _read(folder, site))


def info_of(layout: Layout, announced: Announced, site: str, name: str) -> DictionaryInfo:
    """What is recorded about a foreign dictionary."""
    return DictionaryInfo(
        site=site,
        name=name or "dictionary",
        rule=announced.rule,
        alpha=announced.alpha,
        context_size=announced.context_size,
        prepend_bos=announced.prepend_bos,
        model={
            **({"name": announced.model} if announced.model else {}),
            **({CENTRED: True} if announced.centred_stream else {}),
        },
        corpus={"name": announced.corpus} if announced.corpus else {},
        training={"trained with": layout.name},
    )


def _read(folder: Path, site: str | None) -> Content:
    if not folder.is_dir():
        raise not_there(folder)
    names = {entry.name for entry in folder.iterdir()}
    if is_own(names):
        content = read_folder(folder)
        _agreed(folder, content.info.site, site)
        return content
    layout = layout_of(names)
    if layout is None:
        raise _unknown(folder, names)
    return _read_foreign(folder, layout, site)


def _read_foreign(folder: Path, layout: Layout, site: str | None) -> Content:
    config = read_json(folder / layout.config, f"{layout.name} configuration")
    if not isinstance(config, dict):
        raise LlmWsaeError(f"{folder / layout.config} should be a JSON object")
    place = PurePath(folder.absolute())
    announced = layout.announce(config, place)
    if announced.site is None and site is None:
        raise LlmWsaeError(
            f"{folder} holds a dictionary of {layout.name} that does not say where it belongs; "
            'load it in Python with site="blocks.N.hook_resid_post" and save it'
        )
    try:
        Site.parse(announced.site or site or "")
    except UsageError as error:
        raise LlmWsaeError(
            f"{folder} holds a dictionary of {layout.name} that cannot be used: {error}"
        ) from None
    site = _agreed(folder, announced.site, site)
    weights = layout.read(folder, config, announced)
    check_finite(weights.tensors, f"{folder}, after folding")
    info = info_of(layout, announced, site, place.name)
    return Content(weights.tensors, weights.sparsity, info, {})


def _agreed(folder: Path, said: str | None, asked: str | None) -> str:
    if said is not None and asked is not None and said != asked:
        raise UsageError(f"{folder} says that it belongs to {said}, not to {asked}")
    return said or asked or ""


def _unknown(folder: Path, names: Collection[str]) -> LlmWsaeError:
    known = ", ".join(map(str, LAYOUTS))
    for layout in LAYOUTS:
        if layout.weights in names:
            return LlmWsaeError(
                f"{folder} looks like a dictionary of {layout.name}, but lacks {layout.config}"
            )
    shown = ", ".join(sorted(names)[:4]) or "nothing"
    return LlmWsaeError(
        f"{folder} holds {shown} and no dictionary that can be read: known layouts are llm-wsae "
        f"(cfg.json, sae_weights.safetensors, wsae.json and wsae.safetensors), {known}"
    )
