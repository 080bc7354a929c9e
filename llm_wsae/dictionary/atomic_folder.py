"""Replacing a folder by another one atomically: completely, or not at all."""

import glob
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from llm_wsae.errors import LlmWsaeError
from llm_wsae.files import way_out

T = TypeVar("T")

_ATTEMPTS = 100
_BETWEEN_RENAMES = 0.001  # seconds, far longer than they take


@contextmanager
def replacing(folder: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """The path of a new folder, which replaces ``folder`` if the block succeeds.

    First the leftovers of killed writers are removed; then ``check`` may refuse the replacement.
    Raises what ``check`` raises, and LlmWsaeError if a folder cannot be renamed. After an error the
    old folder is unchanged.
    """
    folder = Path(os.path.abspath(folder))
    clear_up(folder)
    check(folder)
    new = _temporary(folder, "new")
    try:
        yield new
        _swap(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def retry_if_replaced(folder: Path, read: Callable[[], T]) -> T:
    """What ``read`` finds in a folder; once more if the folder was replaced meanwhile, so that
    ``read`` found files of two folders, or none.

    Raises what ``read`` raises, LlmWsaeError where that is an error of the operating system.
    """
    attempts = 0
    while True:
        before = _version(folder)
        try:
            return read()
        except (LlmWsaeError, OSError) as error:
            attempts += 1
            replaced = before != _version(folder) or (before is None and _is_swapped(folder))
            if replaced and attempts < _ATTEMPTS:
                time.sleep(_BETWEEN_RENAMES)
            elif isinstance(error, OSError):
                reason = (error.strerror or str(error)).lower()
                raise LlmWsaeError(
                    f"{folder}: {reason}; {way_out(error, 'check it, and try again')}"
                ) from error
            else:
                raise


def _version(folder: Path) -> tuple[int, int] | None:
    """What differs between a folder and another one in its place; None if there is none."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def _is_swapped(folder: Path) -> bool:
    """Whether a writer is between its two renames."""
    writers = [process for _, process in _temporaries(folder, "old")]
    return any(process == os.getpid() or _is_running(process) for process in writers)


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


def _temporaries(folder: Path, what: str) -> Iterator[tuple[Path, int]]:
    """Such paths of all processes, with the processes' numbers."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.(\d+)\.{what}", re.ASCII)
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*.{what}"):
        if found := name.fullmatch(path.name):
            yield path, int(found[1])


def _leftovers(folder: Path, what: str) -> Iterator[Path]:
    """Such paths left by processes that have ended."""
    return (path for path, process in _temporaries(folder, what) if not _is_running(process))


def clear_up(folder: Path) -> None:
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
