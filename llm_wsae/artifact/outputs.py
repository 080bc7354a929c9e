"""Where results will go, looked at before the work begins.

A result must be writable there, and nothing of other people is replaced: a file that exists under
its name must be empty, or an earlier result of the same kind.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from llm_wsae.artifact.files import read_json, write_error
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.outside import mapping


def check_file(path: Path, is_ours: Callable[[Path], bool]) -> None:
    """Raises UsageError if a path is a folder or below a file; LlmWsaeError if it is someone else's
    file, as ``is_ours`` judges one that is there, or cannot be written."""
    if _is_there(path):
        if path.is_dir():
            raise UsageError(f"--out is the name of a file to write, but {path} is a folder")
        if not path.is_file() or not (path.stat().st_size == 0 or is_ours(path)):
            raise LlmWsaeError(
                f"{path} already exists and was not written by this command; choose another name "
                "or move it"
            )
    _check_writable(path, path.parent)


def check_folder(path: Path) -> None:
    """Raises UsageError if a path is no folder and cannot become one, LlmWsaeError if it cannot be
    written."""
    if _is_there(path) and not path.is_dir():
        raise UsageError(f"--out is the name of a folder, but {path} is a file")
    _check_writable(path, path)


def check_room(path: Path, needed: int, way_out: str) -> None:
    """Raises UsageError if ``needed`` bytes are more than the whole disk of a path could hold."""
    total = shutil.disk_usage(existing(path)).total
    if 0 < total < needed:  # some file systems do not tell
        raise UsageError(
            f"{path} would need {needed / 2**30:,.0f} GiB, but its disk has {total / 2**30:,.0f} "
            f"in all; {way_out}, or choose a folder on a larger disk"
        )


def free_space(path: Path) -> int:
    """Bytes that are free on the disk of a path, which may not exist yet."""
    return shutil.disk_usage(existing(path)).free


def is_record_of(command: str) -> Callable[[Path], bool]:
    """What tells whether a file is the JSON record of that command."""

    def is_ours(path: Path) -> bool:
        try:
            return mapping(read_json(path, "record")).get("command") == command
        except LlmWsaeError:
            return False

    return is_ours


def _is_there(path: Path) -> bool:
    """Whether there is anything of that name, be it a broken link."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # e.g. a name that is too long
        raise write_error(path, error) or error from error
    return True


def _check_writable(path: Path, folder: Path) -> None:
    """Write and delete a file in the folder, or in the first of those above it that exists."""
    there = existing(folder)
    if not there.is_dir():
        raise UsageError(f"--out cannot be {path}: {there} is not a folder")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise write_error(path, error) or error from error


def existing(path: Path) -> Path:
    """The path, or the first of the folders above it that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
