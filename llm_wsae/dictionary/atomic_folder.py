"""Replacing a folder by another one atomically: completely, or not at all."""

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
    """The path of a new folder, which replaces ``folder`` if the block succeeds.

    First the leftovers of killed writers are removed; then ``check`` may refuse the replacement.
    Raises what ``check`` raises, and LlmWsaeError if a folder cannot be renamed. After an error the
    old folder is unchanged.
    """
    folder = Path(os.path.abspath(folder))
    _clear_up(folder)
    check(folder)
    new = _temporary(folder, "new")
    try:
        yield new
        _swap(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def not_there(folder: Path) -> LlmWsaeError:
    """The error for a missing dictionary folder; a killed writer may have left it renamed."""
    left = _left_aside(folder)
    way_out = f"; a writer was killed there: rename {left} to it" if left else ""
    return LlmWsaeError(
        f"{folder} is not a folder, so no dictionary can be loaded from it{way_out}"
    )


def _left_aside(folder: Path) -> Path | None:
    """Where a writer that was killed between two renames left the old ``folder``."""
    left = sorted(_leftovers(folder, "old"))
    return left[-1] if left else None


def _temporary(folder: Path, what: str) -> Path:
    """The temporary path of this process for the ``new`` or the ``old`` folder."""
    return folder.with_name(f".{folder.name}.{os.getpid()}.{what}")


def _leftovers(folder: Path, what: str) -> Iterator[Path]:
    """Such paths left by processes that have ended."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.(\d+)\.{what}", re.ASCII)
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*.{what}"):
        found = name.fullmatch(path.name)
        if found is not None and not _is_running(int(found[1])):
            yield path


def _clear_up(folder: Path) -> None:
    """Restore a folder that a killed writer left renamed, and delete other leftovers."""
    left = _left_aside(folder)
    if left is not None and not os.path.lexists(folder):
        with _as_write_error(folder):
            os.rename(left, folder)
    for path in [*_leftovers(folder, "new"), *_leftovers(folder, "old")]:
        shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    """Whether another process of that id is running on this machine."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _swap(new: Path, folder: Path) -> None:
    """Rename ``new`` to ``folder``; an old folder is moved aside and deleted afterwards.

    A kill between the two renames leaves both folders intact under their temporary names.
    """
    old = _temporary(folder, "old")
    with _as_write_error(folder):
        if not folder.exists():
            os.rename(new, folder)
            return
        os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            os.rename(old, folder)
            raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _as_write_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LlmWsaeError(f"cannot write {folder}: {error.strerror}") from error
