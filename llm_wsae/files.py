"""Files that are complete or absent: atomic writes, checksums, a lock on a folder.

Everything is written under a temporary name in the same folder, synced, then renamed, so that a
process killed at any instant leaves either the old file or the new one.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_wsae.errors import LlmWsaeError

PARTIAL_SUFFIX = ".partial"
_FULL = "free some space or choose another folder, then run the same command again to resume"
_NO_ACCESS = "ask its owner for access, or choose another"
_WAYS_OUT = {
    errno.EACCES: _NO_ACCESS,
    errno.EPERM: _NO_ACCESS,
    errno.EROFS: "choose a folder that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "it is a link that leads back to itself, so remove it",
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}
_PARTIALS = re.compile(rf"\..+\.\d+{re.escape(PARTIAL_SUFFIX)}", re.ASCII)  # with a process id


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file next to ``path``, sync it and rename it to ``path``.

    The file has a temporary folder to itself: ``write`` may leave files of its own there when it is
    killed (safetensors does), and any name that ``path`` can have fits.

    Raises LlmWsaeError if the disk is full or the folder cannot be written; nothing is left behind
    then, and the old file is unchanged.
    """
    path, mine = Path(path), f".{os.getpid()}{PARTIAL_SUFFIX}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(mine, ".write.", path.parent) as place:
            partial = Path(place) / path.name
            write(partial)
            _sync(partial)
            os.replace(partial, path)
        _sync(path.parent)
    except BaseException as error:
        refusal = write_error(path, error)
        if refusal is None:
            raise
        raise refusal from error


def write_error(path: Path, error: BaseException) -> LlmWsaeError | None:
    """The error for a write that the operating system refused; None for any other error."""
    reason = _system_reason(error)
    if reason is None:
        return None
    return LlmWsaeError(f"cannot write {path}: {reason}; {way_out(error, _FULL)}")


def way_out(error: BaseException, otherwise: str) -> str:
    """What to do about something that the operating system refused."""
    return _WAYS_OUT.get(getattr(error, "errno", None), otherwise)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_atomic(path, lambda partial: _write_bytes(partial, text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file; ``what`` names it in the error ("store manifest").

    Raises LlmWsaeError if the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LlmWsaeError(f"there is no {path}; it should be the {what}") from None
    except (ValueError, OSError, RecursionError) as error:  # the last: endless brackets
        raise LlmWsaeError(f"{path} is not a readable {what}: {error}") from error


def save_tensors(
    path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically (tensors are made contiguous on the CPU)."""
    from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, lambda partial: save_file(ready, partial, metadata=metadata))


def load_tensors(path: Path, what: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Read all of a safetensors file: (tensors, metadata). ``what`` names it in the error.

    Raises LlmWsaeError if the file is missing, truncated or not safetensors.
    """
    with open_tensors(path, what) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextmanager
def open_tensors(path: Path, what: str) -> Iterator[Any]:
    """A safetensors file as ``safe_open`` opens it, to read parts of it.

    ``what`` names it in the error. Raises as ``load_tensors`` does.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise LlmWsaeError(f"there is no {path}; it should be the {what}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise LlmWsaeError(f"{path} is not a readable {what}: {error}") from error


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def folder_lock(folder: Path, what: str, shared: bool = False) -> Iterator[Callable[[], None]]:
    """Lock a folder for one run that writes to it; the kernel releases it when its processes end.

    Yields a function: once it is called, other processes may hold the folder ``shared`` with this
    one, but none may hold it alone. Raises LlmWsaeError if another run holds it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "a+")  # noqa: SIM115 - held until the block ends
    except OSError as error:
        raise write_error(folder, error) or error from error

    def hold(kind: int) -> None:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LlmWsaeError(
                f"another process is writing the {what} in {folder}; wait for it or choose "
                "another folder"
            ) from None
        except OSError as error:
            raise LlmWsaeError(
                f"{folder} cannot be locked ({error.strerror}); choose a folder on a file system "
                "that supports locks, such as a local disk"
            ) from error

    try:
        hold(fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield lambda: hold(fcntl.LOCK_SH)
    finally:
        handle.close()


def remove_partials(folder: Path, *below: str) -> None:
    """Delete what killed writers left half written in a folder and in the subfolders ``below``.

    Nothing else is touched. Call this only under the folder's lock.
    """
    for own in (Path(folder), *(Path(folder) / name for name in below)):
        for path in own.glob(".*"):
            if not _PARTIALS.fullmatch(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _write_bytes(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _system_reason(error: BaseException) -> str | None:
    """The operating system's reason for a failed write, also if safetensors wrapped it."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if type(error).__name__ == "SafetensorError":
        return str(error)
    return None
