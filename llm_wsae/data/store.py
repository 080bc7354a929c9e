"""Reading an activation store: rows of a site, their statistics, and the text behind each row.

manifest.json                      what the rows are; every file's size and checksum
tokens/00000.safetensors           ids, keep, document, offset [contexts, positions]
blocks.9.hook_resid_post/
    00000.safetensors              activations [rows, d_in]: the kept positions, in order
    00000.statistics.safetensors   their statistics
    statistics.safetensors         the statistics of all rows
"""

import bisect
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.data.covariance import second_moment_of
from llm_wsae.data.finishing import read_statistics
from llm_wsae.data.manifest import (
    REPAIR,
    STATISTICS,
    Manifest,
    complete_shards,
    shard_paths,
    tokens_path,
)
from llm_wsae.data.packing import Contexts, load_contexts
from llm_wsae.data.shard_reader import RowReader, RowShard
from llm_wsae.data.shuffling import WINDOW_BYTES, shuffled_batches
from llm_wsae.data.stored_measurement import MEASUREMENTS
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.model.site import Site
from llm_wsae.statistics.documents import TextSize
from llm_wsae.statistics.moments import Statistics
from llm_wsae.statistics.second_moment import SecondMoment

_SHARDS_OF_TOKENS_KEPT = 8
_CONTEXTS_AT_ONCE = 8  # of the text that is read for a measurement


class Located(NamedTuple):
    """Where rows come from."""

    context: Int[Tensor, " rows"]
    """Number of the context in the store."""
    position: Int[Tensor, " rows"]
    """Position in the context."""
    document: Int[Tensor, " rows"]
    """Number of the document in the corpus, counted through all stores that are read in turn; -1
    for a token that belongs to none."""
    offset: Int[Tensor, " rows"]
    """Number of the token in its document."""
    ids: Int[Tensor, "rows positions"]
    """All token ids of the context."""


class ActivationStore:
    """A complete activation store on disk; open one with ``open``."""

    in_step = False
    model = None

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.stores: Sequence[ActivationStore] = [self]
        self.manifest = manifest
        self.sites = [Site.parse(name) for name in manifest.sites]
        self.d_in = manifest.d_in
        self.num_rows = manifest.num_rows
        self.context_size = manifest.context_size
        self._row_ends = list(accumulate(shard.rows for shard in manifest.shards))
        self._context_ends = list(accumulate(shard.contexts for shard in manifest.shards))
        self._tokens_of = functools.lru_cache(_SHARDS_OF_TOKENS_KEPT)(self._load_tokens)

    @classmethod
    def open(cls, folder: Path | str) -> "ActivationStore":
        """Open a store.

        Raises LlmWsaeError if there is none, it has another format, or it is unfinished.
        """
        folder = Path(folder)
        manifest = Manifest.load(folder)
        if not manifest.complete:
            there = sum(shard.contexts for shard in complete_shards(folder, manifest).values())
            raise LlmWsaeError(
                f"the store {folder} is not complete: {there} of {manifest.num_contexts} contexts "
                "are there; run its harvest again to resume it"
            )
        return cls(folder, manifest)

    def check_model(self, identity: dict[str, Any]) -> None:
        """Raises LlmWsaeError if a model of that ``identity()`` did not make this store."""
        mine = self.manifest.model
        for key in ("weights_sha256", "dtype"):
            if mine.get(key) != identity.get(key):
                what = "dtype" if key == "dtype" else "weights"
                way_out = f"; load it with --model-dtype {mine[key]}" if key == "dtype" else ""
                raise LlmWsaeError(
                    f"the store {self.folder} was made by {mine.get('name')} in {mine['dtype']}, "
                    f"not by {identity.get('name')} in {identity.get('dtype')} (other {what})"
                    f"{way_out}"
                )

    def statistics(self, site: Site) -> Statistics:
        """The statistics of all rows of a site. Raises LlmWsaeError if their file is damaged."""
        name = f"{self._name(site)}/{STATISTICS}"
        return read_statistics(self.folder / name, self.manifest.statistics[name])

    def second_moment(self, site: Site) -> SecondMoment:
        """The covariance sums of the rows that are not massive: those kept in the store, or else
        measured in one pass, by all processes of this run, and kept."""
        return second_moment_of(self, site)

    def evidence(self, site: Site, need: str) -> tuple[Path, dict[str, Any]]:
        """The file in which a measurement of these rows is kept, and what identifies them."""
        name = f"{site}.{need}.safetensors"
        return self.folder / MEASUREMENTS / name, {"rows": self.identity(site)["sha256"]}

    def some_text(self, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids, and which of them give a row, of about ``tokens`` rows in complete contexts
        spread evenly over the store, a few contexts at a time."""
        total = self.manifest.num_contexts
        wanted = max(1, min(total, -(-min(tokens, self.num_rows) * total // self.num_rows)))
        chosen = torch.linspace(0, total - 1, wanted, dtype=torch.float64).round().long()
        for shard in range(len(self.manifest.shards)):
            contexts = self.contexts(shard)
            ids, keep = torch.from_numpy(contexts.ids), torch.from_numpy(contexts.keep)
            first = self.first_context(shard)
            here = chosen[(chosen >= first) & (chosen < first + len(keep))] - first
            for batch in here.split(_CONTEXTS_AT_ONCE) if len(here) else ():
                yield ids[batch].long(), keep[batch]

    def batches(
        self, batch_size: int, seed: int, start: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[Float[Tensor, "rows d_in"], ...]]:
        """The batches of all sites: the same rows of the text in each."""
        sources = (self.source(site) for site in self.sites)
        return zip(
            *(source.batches(batch_size, seed, start, part) for source in sources), strict=True
        )

    def rows(self, site: Site, start: int, stop: int) -> Float[Tensor, "rows d_in"]:
        """Rows ``start`` to ``stop`` in the order of the text, in the store's dtype."""
        if not 0 <= start <= stop <= self.num_rows:
            raise UsageError(f"there are no rows {start} to {stop}; the store has {self.num_rows}")
        return self.reader(site).rows(start, stop)

    def reader(self, site: Site) -> RowReader:
        """A reader of a site's rows, for many calls: it compares each row with its checksum once.

        Raises UsageError if the store lacks the site.
        """
        return RowReader(self.row_shards(site), self.d_in, getattr(torch, self.manifest.dtype))

    def row_shards(self, site: Site) -> list[RowShard]:
        """The files of a site's rows, in their order. Raises UsageError if the store lacks it."""
        name = self._name(site)
        return [
            RowShard(self.folder, shard_paths(index, name)[0], record)
            for index, record in enumerate(self.manifest.shards)
        ]

    def source(self, site: Site, window_bytes: int = WINDOW_BYTES) -> "StoreSource":
        """One site as a trainer reads it (an ActivationSource)."""
        return StoreSource(self, site, window_bytes)

    def contexts(self, shard: int) -> Contexts:
        """The contexts of one shard, with the names and labels of their documents."""
        return self._tokens_of(shard)

    def first_context(self, shard: int) -> int:
        """Number of the first context of a shard in the store."""
        return self._context_ends[shard - 1] if shard else 0

    def place_of_context(self, number: int) -> tuple[int, int]:
        """The shard that a context is in, and its place there."""
        shard = bisect.bisect_right(self._context_ends, number)
        return shard, number - self.first_context(shard)

    def locate(self, rows: Int[Tensor, " rows"]) -> Located:
        """Where rows come from, by their numbers in the store.

        Raises UsageError for a number that the store does not have.
        """
        numbers = rows.numpy()
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < self.num_rows):
            raise UsageError(f"a row number is not one of the store's {self.num_rows} rows")
        found = np.empty((4, len(numbers)), dtype=np.int64)
        ids = np.empty((len(numbers), self.context_size), dtype=np.int32)
        shards = np.searchsorted(self._row_ends, numbers, side="right")
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            first = self._row_ends[shard - 1] if shard else 0
            contexts = self._tokens_of(shard)
            context, position = (a[numbers[here] - first] for a in np.nonzero(contexts.keep))
            found[0, here] = context + self.first_context(shard)
            found[1, here] = position
            found[2, here] = contexts.document[context, position]
            found[3, here] = contexts.offset[context, position]
            ids[here] = contexts.ids[context]
        return Located._make([*torch.from_numpy(found), torch.from_numpy(ids)])

    def text_size(self, rows: int | None = None) -> TextSize:
        """Of how many documents the first ``rows`` rows are, or all."""
        wanted = self.num_rows if rows is None else min(rows, self.num_rows)
        shards = range(int(np.searchsorted(self._row_ends, wanted)) + 1)
        documents = [(c := self.contexts(shard)).document[c.keep] for shard in shards]
        return TextSize.of(np.concatenate(documents)[:wanted])

    def document(self, row: int) -> dict[str, Any]:
        """Name and labels of the document that a row comes from; empty if there is none."""
        shard = int(np.searchsorted(self._row_ends, row, side="right"))
        number = int(self.locate(torch.tensor([row])).document)
        return self._tokens_of(shard).headers.get(number, {})

    def identity(self, site: Site) -> dict[str, Any]:
        """JSON values that identify a site's rows."""
        files = {
            path: record.sha256
            for path, record in self.manifest.all_files().items()
            if path.startswith(f"{site}/")
        }
        digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        return {
            "kind": "store",
            "site": self._name(site),
            "model": self.manifest.model,
            "corpus": self.manifest.corpus,
            "packing": self.manifest.packing,
            "dtype": self.manifest.dtype,
            "num_rows": self.num_rows,
            "sha256": digest,
        }

    def _name(self, site: Site) -> str:
        if site not in self.sites:
            raise UsageError(
                f"the store {self.folder} has no {site}; {nearest(str(site), self.manifest.sites)}"
            )
        return str(site)

    def _load_tokens(self, shard: int) -> Contexts:
        record, path = self.manifest.shards[shard], self.folder / tokens_path(shard)
        record.files[tokens_path(shard)].check(path, REPAIR)
        return load_contexts(path, record.first, record.next)


class StoreSource:
    """The rows of one site of a store, as an ActivationSource."""

    def __init__(self, store: ActivationStore, site: Site, window_bytes: int = WINDOW_BYTES):
        self.store = store
        self.site = site
        self.d_in = store.d_in
        self.num_rows: int | None = store.num_rows
        self.prepends_bos = store.manifest.bos_token_id is not None
        self._window_bytes = window_bytes
        self._identity = store.identity(site)

    def batches(
        self, batch_size: int, seed: int, start: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Float[Tensor, "rows d_in"]]:
        """Endless shuffled batches of the rows from batch ``start`` on, read ahead; of each, only
        the rows of ``part`` (its number, of how many) are read.

        Which rows are in a batch depends only on the seed, the batch size and ``window_bytes``.
        """
        reader = self.store.reader(self.site)
        return shuffled_batches(reader, batch_size, seed, start, self._window_bytes, part)

    def statistics(self) -> Statistics:
        """The statistics of all rows."""
        return self.store.statistics(self.site)

    def identity(self) -> dict[str, Any]:
        """JSON values that identify these rows in this order."""
        return {**self._identity, "window_bytes": self._window_bytes}
