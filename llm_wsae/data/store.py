"""Reading an activation store: rows of a site, their statistics, and the text behind each row.

manifest.json                      what the rows are; every file's size and checksum
tokens/00000.safetensors           ids, keep, document, offset [contexts, positions]
blocks.9.hook_resid_post/
    00000.safetensors              activations [rows, d_in]: the kept positions, in order
    00000.statistics.safetensors   their statistics
    statistics.safetensors         the statistics of all rows
evidence/                          what was measured for weight rules

Machines that share no folder each harvest other text into a store of their own. ``open_stores``
reads them as one, and copies nothing: all rows of the first, then those of the second, and so on.
"""

import bisect
import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from llm_wsae.artifact.artifact import differences
from llm_wsae.artifact.files import load_own_tensors, save_own_tensors
from llm_wsae.artifact.provenance import plain
from llm_wsae.data.manifest import (
    REPAIR,
    STATISTICS,
    Manifest,
    complete_shards,
    read_statistics,
    shard_paths,
    tokens_path,
)
from llm_wsae.data.packing import NO_DOCUMENT, Contexts, load_contexts
from llm_wsae.data.shards import RowFile, RowReader
from llm_wsae.data.shuffling import WINDOW_BYTES, shuffled_batches
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.machine.processes import join, leads, progress
from llm_wsae.model.site import Site
from llm_wsae.statistics.documents import TextSize
from llm_wsae.statistics.moments import Statistics
from llm_wsae.statistics.second_moment import SecondMoment

MEASUREMENTS = "evidence"
_SHARDS_OF_TOKENS_KEPT = 8
_CONTEXTS_AT_ONCE = 8  # of the text that is read for a measurement
_PARTS = 16  # of the rows; as many processes at most share the work of the covariance
_ROWS_AT_ONCE = 16_384


@dataclass(frozen=True)
class StoredMeasurement:
    """A measurement that is kept on disk, valid only for the same rows and settings."""

    path: Path | None
    """Its file; None if it is not kept."""
    rows: dict[str, Any]
    """What identifies the rows; JSON."""
    settings: dict[str, Any]

    def read(self) -> dict[str, Tensor] | None:
        """The tensors by name; None if they are not there, damaged, or of something else."""
        if self.path is None or not self.path.exists():
            return None
        rows, why = plain(self.rows), "it is of other rows"
        try:
            tensors, header = load_own_tensors(self.path, "measurement")
            if header.items() >= rows.items():
                return tensors if header == {**rows, **self.settings} else None
        except LlmWsaeError:  # which would say to delete the file
            why = "it is damaged"
        if leads():
            tqdm.write(f"what {self.path} holds is measured anew, since {why}", file=sys.stderr)
        return None

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Keep what was measured; if the store cannot be written to, say so."""
        if self.path is None or not leads():
            return
        try:
            save_own_tensors(self.path, tensors, {**plain(self.rows), **self.settings})
        except LlmWsaeError as error:  # a read-only store
            tqdm.write(f"the measurement is not kept: {error}", file=sys.stderr)


class Located(NamedTuple):
    """Where rows come from."""

    context: Int[Tensor, " rows"]
    """Number of the context in the store."""
    position: Int[Tensor, " rows"]
    """In the context."""
    document: Int[Tensor, " rows"]
    """Number of the document in the corpus; -1 for a token that belongs to none."""
    offset: Int[Tensor, " rows"]
    """Number of the token in its section."""
    ids: Int[Tensor, "rows positions"]
    """All token ids of the context."""


class ActivationStore:
    """A complete activation store on disk; open one with ``open``."""

    in_step = False
    model = None

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
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
        """Raises LlmWsaeError if there is no store, it has another format, or it is unfinished."""
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

    # --- Rows

    def source(self, site: Site, window_bytes: int = WINDOW_BYTES) -> "StoreSource":
        """One site as a trainer reads it (an ActivationSource)."""
        return StoreSource(self, site, window_bytes)

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
        Raises UsageError if the store lacks the site."""
        return RowReader(self._row_files(site), self.d_in, getattr(torch, self.manifest.dtype))

    def identity(self, site: Site) -> dict[str, Any]:
        """JSON values that identify a site's rows."""
        return {
            "kind": "store",
            "site": self._name(site),
            "model": self.manifest.model,
            "corpus": self.manifest.corpus,
            "packing": self.manifest.packing,
            "dtype": self.manifest.dtype,
            "num_rows": self.num_rows,
            "sha256": self._digest(site),
        }

    def _row_files(self, site: Site) -> list[RowFile]:
        name = self._name(site)
        return [
            RowFile(self.folder, shard_paths(index, name)[0], record)
            for index, record in enumerate(self.manifest.shards)
        ]

    def _digest(self, site: Site) -> str:
        files = {
            path: record.sha256
            for path, record in self.manifest.all_files().items()
            if path.startswith(f"{site}/")
        }
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

    def _name(self, site: Site) -> str:
        if site not in self.sites:
            raise UsageError(
                f"the store {self.folder} has no {site}; {nearest(str(site), self.manifest.sites)}"
            )
        return str(site)

    # --- What is known of the rows

    def statistics(self, site: Site) -> Statistics:
        """The statistics of all rows of a site. Raises LlmWsaeError if their file is damaged."""
        name = f"{self._name(site)}/{STATISTICS}"
        return read_statistics(self.folder / name, self.manifest.statistics[name])

    def second_moment(self, site: Site) -> SecondMoment:
        """The covariance sums of the rows that are not massive: those kept in the store, or else
        measured in one more pass, and kept. Which rows are massive depends on the median norm of
        all of them.

        The processes of this run divide the rows. What they sum is merged in the order of the rows,
        so that it does not depend on their number.
        """
        kept, processes = self.evidence(site, "second_moment"), join()
        tensors = processes.lead(lambda: kept.read() or self._added_up(site))
        if tensors is not None:
            return SecondMoment.from_tensors(tensors)
        found = SecondMoment(self.d_in)
        mine = self._sums_of_parts(site, range(processes.rank, _PARTS, processes.size))
        for _ in range(0, _PARTS, processes.size):
            for part in processes.gather(next(mine, None)):
                if part is not None:
                    found.merge(part)
        kept.write(found.to_tensors())
        return found

    def evidence(self, site: Site, need: str, **settings: Any) -> StoredMeasurement:
        """A measurement of these rows, which is kept beside them."""
        path = self.folder / MEASUREMENTS / f"{site}.{need}.safetensors"
        return StoredMeasurement(path, {"rows": self._digest(site)}, settings)

    def _added_up(self, site: Site) -> dict[str, Tensor] | None:
        """The sums of several stores that each of them keeps, together."""
        return None

    def _sums_of_parts(self, site: Site, parts: Sequence[int]) -> Iterator[SecondMoment]:
        """The sums over each of these parts of the rows."""
        threshold, reader = self.statistics(site).massive_threshold, self.reader(site)
        ends = [self.num_rows * number // _PARTS for number in range(_PARTS + 1)]
        total = sum(ends[part + 1] - ends[part] for part in parts)
        with progress("covariance", total, "row") as bar:
            for part in parts:
                found = SecondMoment(self.d_in)
                for start in range(ends[part], ends[part + 1], _ROWS_AT_ONCE):
                    rows = reader.rows(start, min(start + _ROWS_AT_ONCE, ends[part + 1])).float()
                    found.update(rows[rows.norm(dim=1) <= threshold])
                    bar.update(len(rows))
                yield found

    # --- The text behind the rows

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
        """Where rows come from, by their numbers. Raises UsageError for one that is not there."""
        numbers = rows.numpy()
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < self.num_rows):
            raise UsageError(f"a row number is not one of the store's {self.num_rows} rows")
        found = np.empty((4, len(numbers)), dtype=np.int64)
        ids = np.empty((len(numbers), self.context_size), dtype=np.int32)
        shards = np.searchsorted(self._row_ends, numbers, side="right")
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            first = self._row_ends[shard - 1] if shard else 0
            contexts = self.contexts(shard)
            context, position = (a[numbers[here] - first] for a in np.nonzero(contexts.keep))
            found[0, here] = context + self.first_context(shard)
            found[1, here] = position
            found[2, here] = contexts.document[context, position]
            found[3, here] = contexts.offset[context, position]
            ids[here] = contexts.ids[context]
        return Located._make([*torch.from_numpy(found), torch.from_numpy(ids)])

    def document(self, row: int) -> dict[str, Any]:
        """Name and labels of the document that a row comes from; empty if there is none."""
        where = self.locate(torch.tensor([row]))
        shard, _ = self.place_of_context(int(where.context))
        return self.contexts(shard).headers.get(int(where.document), {})

    def text_size(self, rows: int | None = None) -> TextSize:
        """Of how many documents the first ``rows`` rows are, or all."""
        wanted = self.num_rows if rows is None else min(rows, self.num_rows)
        shards = range(int(np.searchsorted(self._row_ends, wanted)) + 1)
        documents = [(c := self.contexts(shard)).document[c.keep] for shard in shards]
        return TextSize.of(np.concatenate(documents)[:wanted])

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


def open_stores(folders: Sequence[Path | str]) -> ActivationStore:
    """Open a store, or several of one model, with the same sites and settings, as one.

    Rows, and so batches, are byte for byte those of one store with the rows of all, in the order of
    the folders. The statistics are merged in float64: numbers of rows, extremes and massive rows
    are those of one harvest, moments differ by rounding, and the sample is another one, as uniform.

    Raises UsageError for no store, or one that is named twice; LlmWsaeError if a store is
    unfinished, does not fit the first, or is of another part of its corpus or of the same corpus.
    """
    places = [Path(folder).resolve() for folder in folders]
    if not places:
        raise UsageError("name at least one activation store")
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise UsageError(f"{folder} is listed twice; name each store once")
    first, *others = stores = [ActivationStore.open(folder) for folder in folders]
    owners = ("the first store", "this one")
    for store in others:
        if clauses := differences(_in_common(first), _in_common(store), owners):
            raise LlmWsaeError(
                f"{store.folder} does not fit {first.folder} ({clauses}); use stores of one model "
                "with the same sites and settings, and the same --part of their texts"
            )
    for one, other in combinations(stores, 2):
        if one.manifest.corpus == other.manifest.corpus:
            raise LlmWsaeError(
                f"{one.folder} and {other.folder} hold the same text (the beginning of "
                f"{one.manifest.corpus['name']}), whose rows would count twice; harvest another "
                "text for one of them"
            )
    return _StoresInTurn(stores) if others else first


def _in_common(store: ActivationStore) -> dict[str, Any]:
    """What stores must have in common. A model may have several names, and how many contexts go
    through it at a time depends on the machine."""
    manifest = store.manifest
    names = ("sites", "dtype", "d_in", "bos_token_id", "packing")
    return {
        "model": {key: manifest.model[key] for key in ("weights_sha256", "dtype")},
        "part": manifest.corpus.get("part"),  # what was held out of one would be trained on
        **{name: getattr(manifest, name) for name in names},
    }


class _StoresInTurn(ActivationStore):
    """Several stores, read one after the other."""

    def __init__(self, stores: Sequence[ActivationStore]):
        manifests = [store.manifest for store in stores]
        corpora = [manifest.corpus for manifest in manifests]
        corpus = {  # all texts as one, named as ``Corpus.open`` names them; a text is held out of
            **corpora[0],  # all stores if it is held out of the one that holds out least
            "name": "+".join(dict.fromkeys(str(one["name"]) for one in corpora)),
            "fingerprint": "+".join(dict.fromkeys(str(one["fingerprint"]) for one in corpora)),
            "heldout_fraction": min(one["heldout_fraction"] for one in corpora),
        }
        joined = replace(
            manifests[0],
            corpus=corpus,
            num_contexts=sum(manifest.num_contexts for manifest in manifests),
            shards=[shard for manifest in manifests for shard in manifest.shards],
            statistics={},
        )
        super().__init__(stores[0].folder, joined)
        self._stores = stores
        self._first_shards = list(accumulate((len(m.shards) for m in manifests), initial=0))
        # a section is at most of one document, and the next one counts once it has begun
        sections = [m.shards[-1].next[0] + 1 for m in manifests]
        self._documents_before = list(accumulate(sections, initial=0))

    def statistics(self, site: Site) -> Statistics:
        first, *others = (store.statistics(site) for store in self._stores)
        for other in others:
            first.merge(other)
        return first

    def evidence(self, site: Site, need: str, **settings: Any) -> StoredMeasurement:
        """Beside what was measured of the first store alone."""
        return super().evidence(site, f"{need}.{self._digest(site)[:16]}", **settings)

    def identity(self, site: Site) -> dict[str, Any]:
        return {**super().identity(site), "stores": len(self._stores)}

    def _row_files(self, site: Site) -> list[RowFile]:
        return [file for store in self._stores for file in store._row_files(site)]

    def _digest(self, site: Site) -> str:
        digests = [store._digest(site) for store in self._stores]
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def _added_up(self, site: Site) -> dict[str, Tensor] | None:
        """None unless the sums are of the same rows: usual ones by the threshold of all rows."""
        whole, total = self.statistics(site), SecondMoment(self.d_in)
        for one in self._stores:
            tensors = one.evidence(site, "second_moment").read()
            if tensors is None or not one.statistics(site).same_are_massive(whole):
                return None
            total.merge(SecondMoment.from_tensors(tensors))
        return total.to_tensors()

    def _load_tokens(self, shard: int) -> Contexts:
        place = bisect.bisect_right(self._first_shards, shard) - 1
        contexts = self._stores[place].contexts(shard - self._first_shards[place])
        own, before = contexts.document, self._documents_before[place]
        return contexts._replace(
            document=np.where(own >= 0, own + np.int32(before), np.int32(NO_DOCUMENT)),
            headers={number + before: header for number, header in contexts.headers.items()},
        )
