"""Files that are complete or absent: atomic writes, proved reads, a lock on a folder.

Everything is written under a temporary name in the same folder, synced, then renamed, so that a
process killed at any instant leaves either the old file or the new one.

A JSON object and a header of tensors end with their own digest, and so does each line of a file
that grows; other files are listed, with theirs, in the record of their folder. A digest finds
damage: a flipped bit, a torn write, an edit. It is no signature: whoever changes a file on purpose
can compute its digest too.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llm_wsae.errors import LlmWsaeError
from llm_wsae.outside import mapping, reason

_DIGEST = "sha256"
_OWN_DIGEST = "own_sha256"  # where the other key holds digests of other files
_HEADER = "llm_wsae"  # key of the JSON object in the metadata of this package's safetensors files
_ENDS_WITH_DIGEST = re.compile(r'[0-9a-f]{8}"\}\Z')
_BLOCK = 4 << 20  # bytes with a CRC-32 of their own
AGAIN = "delete it, then rerun the command that wrote it"  # what to do about a damaged file

_PARTIAL = ".partial"
_FULL = "free some space or choose another folder, then run the same command again to resume"
_ON_DISK = "check the disk or the network that holds it"
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
_PARTIALS = re.compile(rf"\..+\.\d+{re.escape(_PARTIAL)}", re.ASCII)  # with a process id


class Damaged(ValueError):
    """The digest is not that of the content."""

    def __str__(self) -> str:
        return "its checksum does not match"


def json_text(value: Mapping[str, Any], *, indent: int | None = 1) -> str:
    """JSON as this package writes it: keys in the order given, then the digest of all entries."""
    read = json.loads(json.dumps(value, ensure_ascii=False))
    whole = json.dumps(read, ensure_ascii=False, sort_keys=True)
    digest = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()
    key = _OWN_DIGEST if _DIGEST in value else _DIGEST
    return json.dumps({**value, key: digest}, indent=indent, ensure_ascii=False) + "\n"


def check_json(text: str, *, indent: int | None = 1) -> dict[str, Any]:
    """The object that ``json_text`` wrote, without its digest. Raises Damaged if the text, to the
    last space, is not what was written; ValueError if it is not JSON."""
    value = json.loads(text)
    key = next(reversed(value), None) if isinstance(value, dict) else None
    if key not in (_DIGEST, _OWN_DIGEST):
        raise Damaged
    del value[key]
    if json_text(value, indent=indent) != text:
        raise Damaged
    return value


def json_line(value: Mapping[str, Any]) -> str:
    """An object as one line of JSON that ends with its digest."""
    return json_text(value, indent=None)


def check_line(text: str) -> dict[str, Any]:
    """``check_json`` for what ``json_line`` gave, with its line's end or without."""
    return check_json(text.removesuffix("\n") + "\n", indent=None)


def digest_of_tensors(facts: Mapping[str, Any], tensors: Iterable[tuple[str, Any]]) -> str:
    """The SHA-256 of the facts and of every tensor's name, type, shape and the CRC-32s of its 4 MiB
    blocks: training waits for a checkpoint, hence a cheap checksum on all cores. The tensors, by
    name and on the CPU, are taken one at a time."""
    import torch

    whole = hashlib.sha256(json.dumps(json.loads(json.dumps(facts)), sort_keys=True).encode())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, tensor in tensors:
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            pieces = [data[start : start + _BLOCK] for start in range(0, len(data), _BLOCK)]
            checks = list(pool.map(zlib.crc32, pieces))
            shown = json.dumps([name, str(tensor.dtype), list(tensor.shape), checks])
            whole.update(shown.encode())
    return whole.hexdigest()


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file, sync it and rename it to ``path``. The file has a
    temporary folder to itself: ``write`` may leave files of its own when it is killed, and any name
    fits.

    Raises LlmWsaeError if the operating system refuses; then the old file is unchanged.
    """
    mine = f".{os.getpid()}{_PARTIAL}"
    with refusals_to_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(mine, ".write.", path.parent) as place:
            partial = Path(place) / path.name
            write(partial)
            _sync(partial)
            os.replace(partial, path)
        _sync(path.parent)


@contextmanager
def refusals_to_write(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal, also if safetensors wrapped it, into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise LlmWsaeError(f"cannot write {path}: {why}; {way_out(error, _FULL)}") from error


def way_out(error: BaseException, otherwise: str) -> str:
    """What to do about something that the operating system refused."""
    return _WAYS_OUT.get(getattr(error, "errno", None) or 0, otherwise)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_atomic(path, lambda partial: partial.write_bytes(text.encode()))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, with its own digest, atomically."""
    write_text(path, json_text(value))


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file of anybody. Raises LlmWsaeError, in which ``what`` names it ("store
    manifest"), if the file is missing or is not JSON."""
    with _reading_json(path, what):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def read_own_json(path: Path, what: str, way_out: str = AGAIN) -> dict[str, Any]:
    """Read a JSON object that ``write_json`` wrote. Raises as ``read_json`` does, and LlmWsaeError,
    which ends with ``way_out``, if the digest is not that of the content."""
    with _reading_json(path, what, way_out):
        return check_json(Path(path).read_bytes().decode("utf-8"))


def has_digest(path: Path) -> bool:
    """Whether a JSON file ends with its own digest; one of another tool does not."""
    return b'sha256": "' in path.read_bytes()[-100:]


def save_tensors(
    path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically (tensors are made contiguous on the CPU)."""
    from safetensors.torch import save_file

    ready = _on_cpu(tensors)

    def write(partial: Path) -> None:
        partial.touch()  # with the permissions of any new file: safetensors leaves a private one
        mode = partial.stat().st_mode
        save_file(ready, partial, metadata=metadata)
        partial.chmod(mode)

    write_atomic(path, write)


def save_own_tensors(path: Path, tensors: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically, with facts (JSON) and a digest in its header."""
    ready = _on_cpu(tensors)
    digest = digest_of_tensors(facts, sorted(ready.items()))
    save_tensors(path, ready, {_HEADER: json.dumps({**facts, _DIGEST: digest})})


def load_tensors(path: Path, what: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Read all of a safetensors file: (tensors, metadata). Raises as ``open_tensors`` does."""
    with open_tensors(path, what) as file:
        return dict(each_tensor(file)), file.metadata() or {}


def load_own_tensors(path: Path, what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read all of a file that ``save_own_tensors`` wrote: (tensors, facts). Another tool's file has
    no facts. Raises as ``open_tensors`` does, and LlmWsaeError if the digest does not match."""
    with open_tensors(path, what, AGAIN) as file:
        facts = own_facts(file, path, what)
        return dict(each_tensor(file)), facts or {}


def own_facts(file: Any, path: Path, what: str, way_out: str = AGAIN) -> dict[str, Any] | None:
    """The facts in the header of an open file, after a check of all of its content; None for
    another tool's file. Raises as ``load_own_tensors`` does."""
    metadata = file.metadata() or {}
    # where the key is missing and a digest is not, the key was damaged
    if _HEADER not in metadata and not any(map(_ENDS_WITH_DIGEST.search, metadata.values())):
        return None
    with _reading_json(path, what, way_out):
        facts = dict(mapping(json.loads(metadata.get(_HEADER, "null"))))
        if facts.pop(_DIGEST, None) != digest_of_tensors(facts, each_tensor(file)):
            raise Damaged
        return facts


@contextmanager
def open_tensors(path: Path, what: str, way_out: str = "") -> Iterator[Any]:
    """A safetensors file as ``safe_open`` opens it, to read parts of it. Raises LlmWsaeError, in
    which ``what`` names it and ``way_out`` ends the sentence, if it is missing or cannot be read.
    """
    if not Path(path).is_file():
        raise LlmWsaeError(f"there is no {path}; it should be the {what}")
    try:
        with _opened(path) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise LlmWsaeError(
            f"{path} is not a readable {what}: {reason(error)}{_then(way_out)}"
        ) from error


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except RuntimeError as error:  # torch's own, if another process replaces the folder just now
        raise FileNotFoundError(str(error)) from error


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def folder_lock(folder: Path, what: str, shared: bool = False) -> Iterator[Callable[[], None]]:
    """Lock a folder for one run that writes to it; the kernel releases it when its processes end.
    Once the function that it yields is called, other processes may hold it ``shared`` with this
    one, but none alone. Raises LlmWsaeError if another run holds it."""
    with refusals_to_write(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        handle = open(Path(folder) / ".lock", "a+")  # noqa: SIM115 - held until the block ends

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

    with handle:
        hold(fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield lambda: hold(fcntl.LOCK_SH)


def remove_folder(folder: Path) -> None:
    """Delete a folder, or leave to ``remove_partials`` what a kill leaves of it."""
    leaving = folder.with_name(f".{folder.name}.{os.getpid()}{_PARTIAL}")
    folder.rename(leaving)
    shutil.rmtree(leaving)


def remove_partials(folder: Path, *below: str) -> None:
    """Delete what killed writers left half written in a folder and in the subfolders ``below``,
    and nothing else. Call this only under the folder's lock."""
    for own in (Path(folder), *(Path(folder) / name for name in below)):
        for path in own.glob(".*"):
            if not _PARTIALS.fullmatch(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def _reading_json(path: Path, what: str, way_out: str = "") -> Iterator[None]:
    """Errors of reading JSON, in a file or in a header, as ours."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise LlmWsaeError(f"there is no {path}; it should be the {what}") from None
    except Damaged as error:
        raise LlmWsaeError(f"{path} is damaged: {error}{_then(way_out)}") from error
    except IsADirectoryError:
        raise LlmWsaeError(f"{path} is a folder; it should be the {what}, a file") from None
    except OSError as error:
        reads = f"cannot read {path}, the {what}: {error.strerror or error}"
        raise LlmWsaeError(f"{reads}; {_WAYS_OUT.get(error.errno or 0, _ON_DISK)}") from error
    except (ValueError, RecursionError) as error:  # the last: endless brackets
        raise LlmWsaeError(
            f"{path} is not a readable {what}: {reason(error)}{_then(way_out)}"
        ) from error


def _then(way_out: str) -> str:
    return f"; {way_out}" if way_out else ""


def _on_cpu(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def each_tensor(file: Any) -> Iterator[tuple[str, Any]]:
    """Name and tensor of a file that ``open_tensors`` has opened, one at a time."""
    return ((name, file.get_tensor(name)) for name in sorted(file.keys()))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
