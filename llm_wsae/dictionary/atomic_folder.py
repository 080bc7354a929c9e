"""A dictionary's folder takes the place of another one whole, or not at all."""

import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_wsae.errors import LlmWsaeError


@contextmanager
def replacing(folder: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """A name for a new folder, which takes the place of ``folder`` when the block ends well.

    What a killed writer left beside the name is cleared up first; then ``check`` may refuse. Raises
    what it raises, and LlmWsaeError if a folder cannot be renamed. What was there is then as it
    was.
    """
    folder = Path(os.path.abspath(folder))
    _clear_up(folder)
    check(folder)
    whole = _beside(folder, "new")
    try:
        yield whole
        _swap(whole, folder)
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def not_there(folder: Path) -> LlmWsaeError:
    """What to say of a folder that should be a dictionary's; a kill may have left it beside."""
    left = _older(folder)
    way_out = f"; a writer was killed there, so rename {left} to it" if left else ""
    return LlmWsaeError(
        f"{folder} is not a folder, so no dictionary can be loaded from it{way_out}"
    )


def _older(folder: Path) -> Path | None:
    """Where a writer that was killed between two renames left what had been ``folder``."""
    left = sorted(_siblings(folder, "old"))
    return left[-1] if left else None


def _beside(folder: Path, what: str) -> Path:
    """Where this process keeps the ``new`` folder and the ``old`` one for a while."""
    return folder.with_name(f".{folder.name}.{os.getpid()}.{what}")


def _siblings(folder: Path, what: str) -> Iterator[Path]:
    """The same of writers that live no more."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.(\d+)\.{what}", re.ASCII)
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*.{what}"):
        found = name.fullmatch(path.name)
        if found is not None and not _lives(int(found[1])):
            yield path


def _clear_up(folder: Path) -> None:
    """Give a folder back its name if a kill left it as the old one, and delete other remains."""
    left = _older(folder)
    if left is not None and not os.path.lexists(folder):
        with _as_refusal(folder):
            os.rename(left, folder)
    for path in [*_siblings(folder, "new"), *_siblings(folder, "old")]:
        shutil.rmtree(path, ignore_errors=True)


def _lives(process: int) -> bool:
    """Whether another process of that number lives on this machine."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _swap(whole: Path, folder: Path) -> None:
    """Rename ``whole`` to ``folder``; an older folder steps aside and is deleted afterwards.

    A kill between the two renames leaves both whole beside the name.
    """
    old = _beside(folder, "old")
    with _as_refusal(folder):
        if not folder.exists():
            os.rename(whole, folder)
            return
        os.rename(folder, old)
        try:
            os.rename(whole, folder)
        except OSError:
            os.rename(old, folder)
            raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _as_refusal(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LlmWsaeError(f"cannot write {folder}: {error.strerror}") from error
