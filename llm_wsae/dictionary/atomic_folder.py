"""Replacing a folder by another one atomically: completely, or not at all; one writer at a time."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from llm_wsae.artifact.files import way_out, write_error
from llm_wsae.errors import LlmWsaeError

T = TypeVar("T")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Let one process or thread at a time write to a folder that may be replaced; others wait.

    The lock is a file beside the folder, because a file inside would be replaced with it. Raises
    LlmWsaeError if it cannot be made.
    """
    folder = Path(os.path.realpath(folder))
    path, holds = folder.with_name(f".{folder.name}.writing"), False
    while not holds:
        try:
            handle = open(path, "a")  # noqa: SIM115 - held until the block ends
        except OSError as error:
            raise write_error(folder, error) or error from error
        with handle:
            holds = _wait_for(handle.fileno(), path)
            if holds:
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)  # before the lock is released


def _wait_for(handle: int, path: Path) -> bool:
    """Take the lock; whether the file is still the one that all others look at."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise LlmWsaeError(
            f"{path} cannot be locked ({error.strerror}); choose a folder on a file system that "
            "supports locks, such as a local disk"
        ) from error


@contextmanager
def replacing(folder: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """The path of a new folder, which replaces ``folder`` if the block succeeds.

    First the leftovers of killed writers are removed; then ``check`` may refuse the replacement.
    Raises what ``check`` and ``writing`` raise, and LlmWsaeError if a folder cannot be renamed.
    After an error the old folder is unchanged.
    """
    folder = Path(os.path.abspath(folder))
    with _as_write_error(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with writing(folder):
        _clear_up(folder)
        check(folder)
        new = _beside(folder, "new")
        try:
            yield new
            _swap(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def retry_if_replaced(folder: Path, read: Callable[[], T]) -> T:
    """What ``read`` finds in a folder; once more if the folder was replaced meanwhile, so that
    ``read`` found files of two folders, or none. A folder that a killed writer left renamed is
    restored.

    Raises what ``read`` raises, LlmWsaeError where that is an error of the operating system.
    """
    while True:
        before = _version(folder)
        try:
            return read()
        except (LlmWsaeError, OSError) as error:
            if before is None and _beside(folder, "old").exists():
                clear_up(folder)
            if before != _version(folder):
                continue
            if not isinstance(error, OSError):
                raise
            reason = (error.strerror or str(error)).lower()
            raise LlmWsaeError(
                f"{folder}: {reason}; {way_out(error, 'check it, and try again')}"
            ) from error


def _version(folder: Path) -> tuple[int, int] | None:
    """What differs between a folder and another one in its place; None if there is none."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def not_there(folder: Path) -> LlmWsaeError:
    """The error for a missing dictionary folder."""
    return LlmWsaeError(f"{folder} is not a folder, so no dictionary can be loaded from it")


def _beside(folder: Path, what: str) -> Path:
    """Where the ``new`` folder is written, or the ``old`` one is moved, under the lock."""
    folder = Path(os.path.abspath(folder))
    return folder.with_name(f".{folder.name}.{what}")


def clear_up(folder: Path) -> None:
    """Restore a folder that a killed writer left renamed, and delete other leftovers."""
    if folder.parent.is_dir():
        with writing(folder):
            _clear_up(folder)


def _clear_up(folder: Path) -> None:
    old = _beside(folder, "old")
    if old.exists() and not os.path.lexists(folder):
        with _as_write_error(folder):
            os.rename(old, folder)
    for path in (old, _beside(folder, "new")):
        shutil.rmtree(path, ignore_errors=True)


def _swap(new: Path, folder: Path) -> None:
    """Rename ``new`` to ``folder``; an old folder is moved aside and deleted afterwards.

    A kill between the two renames leaves both folders intact under their temporary names.
    """
    old = _beside(folder, "old")
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
