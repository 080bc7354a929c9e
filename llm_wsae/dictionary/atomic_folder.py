"""Replacing a folder by another one atomically: completely, or not at all; one writer at a time."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from llm_wsae.artifact.files import refusals_to_write


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Let one process or thread at a time write to a folder that may be replaced; others wait.

    The lock is a file beside the folder, because a file inside would be replaced with it. Raises
    LlmWsaeError if it cannot be made.
    """
    folder = Path(os.path.realpath(folder))
    path = folder.with_name(f".{folder.name}.writing")
    with refusals_to_write(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(path)
    with handle:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before the lock is released


def _locked(path: Path) -> IO[str]:
    while True:
        handle = open(path, "a")  # noqa: SIM115 - held by the caller
        fcntl.flock(handle, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):  # the one who held it before deleted it
            if os.path.samestat(os.fstat(handle.fileno()), os.stat(path)):
                return handle
        handle.close()


@contextmanager
def replacing(folder: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """The path of a new folder, which replaces ``folder`` if the block succeeds.

    First the leftovers of killed writers are removed; then ``check`` may refuse the replacement.
    Raises what ``check`` and ``writing`` raise. After an error the old folder is unchanged; a kill
    between the two renames leaves both, and ``restore`` brings the old one back.
    """
    folder = Path(os.path.abspath(folder))
    with writing(folder):
        _clear_up(folder)
        check(folder)
        try:
            yield _beside(folder, "new")
            if folder.exists():
                os.rename(folder, _beside(folder, "old"))
            os.rename(_beside(folder, "new"), folder)
        finally:
            _clear_up(folder)


def restore(folder: Path) -> None:
    """Bring back a folder that a killed writer left renamed."""
    if not os.path.lexists(folder) and _beside(folder, "old").exists():
        clear_up(folder)


def clear_up(folder: Path) -> None:
    """``restore``, and delete what else a killed writer left beside the folder."""
    if folder.parent.is_dir():
        with writing(folder):
            _clear_up(folder)


def _clear_up(folder: Path) -> None:
    old = _beside(folder, "old")
    if old.exists() and not os.path.lexists(folder):
        os.rename(old, folder)
    for path in (old, _beside(folder, "new")):
        shutil.rmtree(path, ignore_errors=True)


def _beside(folder: Path, what: str) -> Path:
    """Where the ``new`` folder is written, or the ``old`` one is moved, under the lock."""
    folder = Path(os.path.abspath(folder))
    return folder.with_name(f".{folder.name}.{what}")
