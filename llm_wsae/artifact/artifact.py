"""A folder that a command makes: begun, resumed or refused, finished, verified.

Its record, a JSON file with its own checksum, is written first and says what was asked for. A run
that finds one resumes, or is refused with what differs. In the end the record lists the files with
their sizes and checksums.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llm_wsae.artifact.files import (
    read_json,
    read_own_json,
    refusals_to_write,
    sha256,
    write_json,
)
from llm_wsae.artifact.provenance import plain, versions
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.outside import mapping

_FORMAT = 1
_SAME_WEIGHTS = 1e-5  # relative: the sum of a matrix is recorded with six digits
_LONGEST = 40  # characters of a value in a sentence


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum that a file must have."""

    bytes: int
    sha256: str  # in hex

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """The record of a file as it is."""
        return cls(path.stat().st_size, sha256(path))

    def has_size(self, path: Path) -> bool:
        """Whether there is a file of that size."""
        return path.is_file() and path.stat().st_size == self.bytes

    def problem(self, path: Path) -> str | None:
        """What is wrong with the file at that path, in a sentence; None if nothing is."""
        try:
            size = path.stat().st_size
            if size != self.bytes:
                return f"{path} is truncated or extended: {size} bytes instead of {self.bytes}"
            if sha256(path) != self.sha256:
                return f"{path} is damaged: its checksum does not match"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        return None

    def check(self, path: Path, way_out: str) -> None:
        """Raise LlmWsaeError, which ends with ``way_out``, if there is a problem."""
        if problem := self.problem(path):
            raise LlmWsaeError(f"{problem}; {way_out}")


@dataclass
class Record:
    """What the record of a folder says."""

    request: dict[str, Any]  # everything that decides what is made
    complete: bool = False
    files: dict[str, FileRecord] = field(default_factory=dict)  # by path within the folder
    facts: dict[str, Any] = field(default_factory=dict)  # what this kind of folder adds; JSON


@dataclass(frozen=True)
class Artifact:
    """A folder of one kind."""

    folder: Path
    name: str  # of its record
    kind: str  # as a sentence names it: ``activation store``

    @property
    def path(self) -> Path:
        """Where the record is."""
        return self.folder / self.name

    def is_begun(self) -> bool:
        """Whether the folder has a record."""
        return self.path.is_file()

    def is_complete(self) -> bool:
        """Whether there is a record of finished work. Raises as ``read`` does."""
        return self.is_begun() and self.read().complete

    def check_place(self, *names: str) -> None:
        """Check that the folder can be written to. Without a record, it must hold none of these
        ``names``, or nothing at all but hidden files if there are none. Raises UsageError if it is
        no folder, LlmWsaeError if it holds something else."""
        check_folder(self.folder)
        if self.is_begun() or not self.folder.is_dir():
            return
        found = sorted(path.name for path in self.folder.iterdir())
        if taken := [one for one in found if (one in names if names else one[0] != ".")]:
            raise LlmWsaeError(
                f"{self.folder} holds other files ({', '.join(taken[:3])}); choose another folder "
                f"for the {self.kind}, or move them"
            )

    def begin(self, request: Mapping[str, Any], *names: str) -> Record:
        """The folder's record, or a new one for this ``request``, under the folder's lock. Raises
        as ``check_place`` and ``check_request`` do."""
        if not self.is_begun():
            self.check_place(*names)
            self.write(Record(plain(request)))
        record = self.read()
        self.check_request(record.request, request)
        return record

    def check_request(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """Raise LlmWsaeError, naming each difference, unless both requests are the same."""
        if clauses := differences(found, wanted, (f"the saved {self.kind}", "this command")):
            raise LlmWsaeError(
                f"the {self.kind} in {self.folder} has other settings ({clauses}); choose another "
                "folder, or use the same settings to resume it"
            )

    def finish(self, record: Record, paths: Iterable[str] = ()) -> None:
        """Write the record of the finished folder, with the files at these ``paths`` within it."""
        record.files |= {path: FileRecord.of(self.folder / path) for path in paths}
        record.complete = True
        self.write(record)

    def write(self, record: Record) -> None:
        """Replace the record."""
        head = {"kind": self.kind, "format": _FORMAT, "versions": versions()}
        value = asdict(record)
        facts = value.pop("facts")
        write_json(self.path, head | value | facts)

    def read(self) -> Record:
        """The folder's record. Raises LlmWsaeError if there is none, or it is damaged or of another
        version or kind."""
        if not self.is_begun():
            raise LlmWsaeError(f"there is no {self.kind} in {self.folder}: it has no {self.name}")
        way_out = "restore it from a copy, or make it again in another folder"
        value = read_own_json(self.path, f"record of the {self.kind}", way_out)
        if (value.get("kind"), value.get("format")) != (self.kind, _FORMAT):
            raise LlmWsaeError(
                f"this version cannot read {self.path} as the record of the {self.kind}; update "
                f"llm-wsae, or make the {self.kind} again, in another folder"
            )
        for name in ("kind", "format", "versions"):
            value.pop(name, None)
        request, complete, files = (value.pop(name) for name in ("request", "complete", "files"))
        return Record(request, complete, files_of(files), facts=value)


def files_of(value: Mapping[str, Any]) -> dict[str, FileRecord]:
    """The files that a record lists, from its JSON."""
    return {path: FileRecord(**one) for path, one in value.items()}


def differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], owners: tuple[str, str]
) -> str:
    """How the settings of two ``owners`` differ, in words; empty if they are the same, up to the
    last digits of weights, which depend on the machine."""
    return "; ".join(_differences(plain(found), plain(wanted), owners))


def _differences(
    found: Mapping[Any, Any], wanted: Mapping[Any, Any], owners: tuple[str, str], under: str = ""
) -> Iterator[str]:
    first, second = owners
    for name in sorted(found.keys() | wanted.keys()):
        there, asked = found.get(name), wanted.get(name)
        if there == asked or (name == "gamma_sum" and _alike(there, asked)):
            continue
        if isinstance(there, dict) and isinstance(asked, dict):
            yield from _differences(there, asked, owners, f"{under}{name} ")
        elif isinstance(there, dict) or isinstance(asked, dict):
            has, lacks = (first, second) if isinstance(there, dict) else (second, first)
            yield f"{has} has {under}{name}; {lacks} does not"
        elif isinstance(there, list) and isinstance(asked, list) and _is_long(there, asked):
            items = dict(enumerate(there)), dict(enumerate(asked))
            yield from _differences(*items, owners, f"{under}{name} ")
        else:
            yield f"{under}{name}: {_short(there)} in {first}, {_short(asked)} in {second}"


def _alike(there: Any, asked: Any) -> bool:
    both = isinstance(there, float) and isinstance(asked, float)
    return both and math.isclose(there, asked, rel_tol=_SAME_WEIGHTS)


def _is_long(*values: Any) -> bool:
    return any(len(json.dumps(value)) > _LONGEST for value in values)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "…"


# --- Where results will go, looked at before the work begins


def check_file(path: Path, is_ours: Callable[[Path], bool]) -> None:
    """Raises UsageError if a path is a folder or below a file; LlmWsaeError if it is someone else's
    file, as ``is_ours`` judges one that is there, or cannot be written."""
    with refusals_to_write(path), suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(path)  # raises if there is nothing, not even a broken link
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
    if os.path.lexists(path) and not path.is_dir():
        raise UsageError(f"--out is the name of a folder, but {path} is a file")
    _check_writable(path, path)


def _check_writable(path: Path, folder: Path) -> None:
    """Write and delete a file in the folder, or in the first of those above it that exists."""
    there = existing(folder)
    if not there.is_dir():
        raise UsageError(f"--out cannot be {path}: {there} is not a folder")
    with refusals_to_write(path):
        tempfile.TemporaryFile(dir=there).close()


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


def existing(path: Path) -> Path:
    """The path, or the first of the folders above it that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
