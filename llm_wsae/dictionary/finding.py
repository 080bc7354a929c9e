"""Which dictionaries a word of the command line names: a folder, those below one, a repository on
the Hub, a pretrained dictionary, or one of a release that SAELens knows."""

import difflib
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import cached_assets_path, constants

from llm_wsae.dictionary.dictionary import pretrained
from llm_wsae.dictionary.folder import clear_up
from llm_wsae.dictionary.formats.reading import is_own, layout_of
from llm_wsae.dictionary.hub.repository import Repository, hub_errors
from llm_wsae.errors import LlmWsaeError, UsageError, nearest

_Found = dict[str, Callable[[], Path]]  # by name; each gives its folder, downloaded if necessary


def find_dictionaries(names: Iterable[Path]) -> list[Path]:
    """The folders of all dictionaries that are named; of those on the Hub, in its cache. Raises
    UsageError, with the nearest names, for one that is not there, and LlmWsaeError if the Hub
    fails."""
    return [get() for name in names for get in _found(name).values()]


def find_dictionary(name: Path) -> Path:
    """The folder of the one that is named. Raises as ``find_dictionaries`` does, and UsageError if
    they are several."""
    found = _found(name)
    if len(found) > 1:
        raise UsageError(f"{name} holds {len(found)} dictionaries; name one: {nearest('', found)}")
    (get,) = found.values()
    return get()


def _found(name: Path) -> _Found:
    said, known = str(name), pretrained()
    release, colon, sae_id = said.partition(":")
    if not os.path.lexists(name):
        clear_up(name)  # what a killed writer left renamed
    if os.path.lexists(name):
        return {str(folder): partial(Path, folder) for folder in _below(name)}
    if said in known:
        return {said: partial(Path, known[said])}
    if colon:
        return {said: partial(_of_release, release, sae_id)}
    return _on_the_hub(name, f"{said!r} is no folder and no pretrained dictionary{_close(name)}")


def _below(path: Path) -> list[Path]:
    """The dictionaries in a folder, or itself; hidden folders are left out."""
    if path.is_file():
        raise UsageError(
            f"{path} is a file, not a dictionary; name the folder that holds the dictionaries: "
            f"{path.parent}"
        )
    found = []
    for here, folders, files in os.walk(path):
        if is_own(files) or layout_of(files):
            found.append(Path(here))
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(found, key=_by_number) or [path]  # loading it says what it holds instead


def _by_number(path: Path) -> list[tuple[str, int]]:
    """Sorts blocks.2 before blocks.10."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D+)(\d*)", f"/{path}")]


def _close(name: Path) -> str:
    """A hint at a folder or pretrained dictionary of a similar name."""
    parent = next(folder for folder in name.parents if folder.is_dir())
    step = parent / name.relative_to(parent).parts[0]  # where the path goes wrong
    beside = [str(path) for path in parent.iterdir() if path.is_dir()]
    close = difflib.get_close_matches(str(step), beside, cutoff=0.7)
    close += difflib.get_close_matches(str(name), pretrained(), cutoff=0.8)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def _on_the_hub(name: Path, missing: str) -> _Found:
    """The dictionaries of user/repo, or that of user/repo/<sae_id>."""
    user, *more = name.parts
    if not more or name.is_absolute() or Path(user).exists():
        raise UsageError(f"{missing}; name one of these, or a repository on the Hub: user/name")
    repo_id = f"{user}/{more[0]}"
    try:
        repository = Repository.open(repo_id)
        wanted = repository.wanted("/".join(more[1:]) or None)
    except LlmWsaeError as error:
        raise type(error)(f"{missing}, and {error}") from error
    return {f"{repo_id}/{one}": partial(repository.dictionary_folder, one) for one in wanted}


def _of_release(release: str, sae_id: str) -> Path:
    """One of SAELens' releases, as SAELens saves it into a cache."""
    if find_spec("sae_lens") is None:
        raise UsageError(
            f"'{release}:{sae_id}' is no folder, and would be a release of SAELens, which is not "
            "installed: pip install 'llm-wsae[saelens]'"
        )
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    if release not in known:
        raise UsageError(f"SAELens has no release {release!r}; {nearest(release, known)}")
    if sae_id not in (own := known[release].saes_map):
        raise UsageError(f"the release {release} has no {sae_id!r}; {nearest(sae_id, own)}")
    folder = cached_assets_path(
        "llm-wsae", "saelens", f"{release}/{sae_id}", assets_dir=constants.HF_ASSETS_CACHE
    )
    if not any(folder.iterdir()):
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            with hub_errors(known[release].repo_id):
                SAE.from_pretrained(release, sae_id).save_model(Path(place) / "new")
            os.replace(Path(place) / "new", folder)
    return folder
