"""Where every latent of several dictionaries fires in a store: one pass over the rows.

What is kept does not grow with the rows, except for 4 bytes a row and dictionary: of each latent
its largest activations, each of another context, and a random sample of the others, from which the
examples of the quantile bands come. The rows are read a second time, without being encoded, for
the activations around the examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_matrix
from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.packing import NO_DOCUMENT
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.sparsity import TopK
from llm_wsae.inspecting.firings import check_store, not_massive
from llm_wsae.outside import mapping

ROWS_AT_ONCE = 1 << 14
BINS_PER_OCTAVE, OCTAVES = 2, 6  # of the histograms, below and above the median activation
SAMPLE = 5  # firings sampled for each band
TOGETHER_ROWS = 1 << 15  # evenly spread, on which latents that fire together are counted
NEIGHBOURS = 5
SOURCES = 3  # dimensions named as the source of an activation
_LATENTS_AT_ONCE = 256  # whose firings together with all others are counted at once
_SPARE = 2  # top firings kept in case two of a latent's are of one context, read in two pieces
_SLACK = 1e-5  # relative, between two float32 ways to the same pre-activation


@dataclass
class Firings:
    """What the latents of one dictionary do in a store. Rows are numbers in the store, −1 where
    there are not as many."""

    rows_seen: int
    """Rows without massive activations."""
    count: Int[Tensor, " d_sae"]
    """Rows on which each latent fires."""
    total: Float[Tensor, " d_sae"]
    """Sum of its activations."""
    histogram: Int[Tensor, "d_sae bins"]
    """Its activations by size, in bins of half an octave."""
    first_edge: float
    """Lower edge of the second bin; the first and the last bin are open."""
    row: Int[Tensor, "d_sae examples"]
    """Its top rows, then one row of each band of its activations, the strongest first; −1 where it
    is a top row already."""
    value: Float[Tensor, "d_sae examples"]
    """Its activations on those rows."""
    edges: Float[Tensor, "d_sae edges"]
    """Between which activations its bands are, from its largest down to 0."""
    together: Int[Tensor, "d_sae neighbours"]
    """The latents that fire together with it most often, the most first."""
    overlap: Float[Tensor, "d_sae neighbours"]
    """Of the rows on which either fires, those on which both do; 0 where there is no neighbour."""


def collect(
    store: ActivationStore,
    dictionaries: Mapping[str, Dictionary],
    top: int,
    bands: int,
    most_rows: int | None = None,
) -> tuple[dict[str, Firings], dict[str, Float[Tensor, " rows"]]]:
    """What every dictionary's latents do, and the smallest active value of every row by dictionary
    (infinite where nothing is explained: on massive rows).

    Raises LlmWsaeError if the store's rows cannot be a dictionary's, or cannot be read.
    """
    (site,) = {dictionary.site for dictionary in dictionaries.values()}
    for dictionary in dictionaries.values():
        check_store(store, dictionary)
    reader = store.reader(site)
    num_rows = min(store.num_rows, most_rows or store.num_rows)
    context = torch.from_numpy(context_of_every_row(store)[:num_rows])
    collectors = {
        name: _Collector(dictionary, context, top, bands)
        for name, dictionary in dictionaries.items()
    }
    with tqdm(total=num_rows, desc="encode", unit="row", unit_scale=True) as bar:
        for start in range(0, num_rows, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, num_rows)
            rows = reader.rows(start, stop).float()
            for collector in collectors.values():
                collector.look(start, rows)
            bar.update(stop - start)
    found = {name: collector.firings() for name, collector in collectors.items()}
    return found, {name: collector.floor for name, collector in collectors.items()}


def context_of_every_row(store: ActivationStore) -> Int[np.ndarray, " rows"]:
    """Number of the context that each row comes from."""
    parts = []
    for shard in range(len(store.manifest.shards)):
        own = np.nonzero(store.contexts(shard).keep)[0]
        parts.append(own + store.first_context(shard))
    return np.concatenate(parts).astype(np.int32)


class _Collector:
    """What one pass over the rows collects of one dictionary."""

    def __init__(self, dictionary: Dictionary, context: Tensor, top: int, bands: int):
        self._dictionary, self._context = dictionary, context
        self._top, self._bands = top, bands
        d_sae = dictionary.d_sae
        self.rows_seen = 0
        self.count = torch.zeros(d_sae, dtype=torch.int64)
        self.total = torch.zeros(d_sae, dtype=torch.float64)
        self.bins = 2 * OCTAVES * BINS_PER_OCTAVE
        self.histogram = torch.zeros(d_sae, self.bins, dtype=torch.int64)
        self.middle: float | None = None
        self.floor = torch.full((len(context),), torch.inf)
        self.best = _Kept(d_sae, top + _SPARE)
        self.sample = _Kept(d_sae, bands * SAMPLE)
        self._stride = max(1, len(context) // TOGETHER_ROWS)
        self._pairs: list[Tensor] = []

    def look(self, start: int, x: Tensor) -> None:
        """Look at consecutive rows, the first of which has the number ``start``."""
        usable = torch.where(not_massive(self._dictionary, x))[0]
        codes = self._dictionary.encode_sparse(x[usable])
        active = codes.values > 0
        self.floor[start + usable] = codes.values.where(active, torch.inf).amin(1)
        self.rows_seen += len(usable)
        latent, value = codes.indices[active], codes.values[active]
        place = usable[:, None].expand_as(active)[active]
        if len(latent) == 0:
            return
        self.count += torch.bincount(latent, minlength=len(self.count))
        self.total.index_add_(0, latent, value.double())
        if self.middle is None:
            self.middle = float(value.median())
        octave = (value / self.middle).log2().add(OCTAVES).mul(BINS_PER_OCTAVE)
        cell = latent * self.bins + octave.long().clamp(0, self.bins - 1)
        self.histogram.view(-1).add_(torch.bincount(cell, minlength=self.histogram.numel()))
        row = place + start
        sampled = row % self._stride == 0
        self._pairs.append(torch.stack([row[sampled] // self._stride, latent[sampled]]).int())
        best = torch.where(self.best.contends(latent, value))[0]
        best = best[_strongest_of_each(latent[best], self._context[row[best]], value[best])]
        self.best.add(latent[best], value[best], value[best], row[best])
        draw = torch.Generator().manual_seed(start)
        self.sample.add(latent, torch.rand(len(value), generator=draw), value, row)

    def firings(self) -> Firings:
        """What was found."""
        row, value = self._without_repeated_contexts()
        bands_row, bands_value, edges = self._of_bands()
        repeated = (bands_row[:, :, None] == row[:, None, :]).any(2)
        bands_row, bands_value = bands_row.where(~repeated, -1), bands_value.where(~repeated, 0)
        octaves = OCTAVES - 1 / BINS_PER_OCTAVE
        return Firings(
            self.rows_seen,
            self.count,
            self.total.float(),
            self.histogram,
            (self.middle or 1.0) * 2**-octaves,
            torch.cat([row, bands_row], 1),
            torch.cat([value, bands_value], 1),
            torch.cat([value[:, :1], edges, torch.zeros_like(value[:, :1])], 1),
            *self._together(),
        )

    def _together(self) -> tuple[Tensor, Tensor]:
        d_sae = len(self.count)
        nothing = torch.empty(2, 0, dtype=torch.int32)
        rows, latents = torch.cat([nothing, *self._pairs], 1).numpy()
        shape = (int(rows.max(initial=0)) + 1, d_sae)
        fires = csr_matrix((np.ones(len(rows), dtype=np.float32), (rows, latents)), shape=shape)
        often = torch.from_numpy(np.asarray(fires.sum(0)).ravel())
        by_latent = fires.T.tocsr()
        found = []
        for start in range(0, d_sae, _LATENTS_AT_ONCE):
            part = by_latent[start : start + _LATENTS_AT_ONCE]
            both = torch.from_numpy((part @ fires).toarray())
            own = torch.arange(len(both))
            either = often[start + own, None] + often - both
            share = both / either.clamp(min=1)
            share[own, start + own] = 0
            found.append(share.topk(min(NEIGHBOURS, d_sae), dim=1))
        return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])

    def _without_repeated_contexts(self) -> tuple[Tensor, Tensor]:
        row, value = self.best.row, self.best.value
        context = self._context[row.clamp(min=0)].where(row >= 0, -1)
        earlier = torch.tril(context[:, :, None] == context[:, None, :], diagonal=-1).any(2)
        first = (row >= 0) & ~earlier
        order = (~first).int().argsort(dim=1, stable=True)[:, : self._top]
        row, value, first = (one.gather(1, order) for one in (row, value, first))
        return row.where(first, -1), value.where(first, 0)

    def _of_bands(self) -> tuple[Tensor, Tensor, Tensor]:
        """One sampled firing from the middle of each band, the strongest band first, and the
        activations between one band and the next."""
        order = self.sample.value.where(self.sample.row >= 0, -1).argsort(dim=1, descending=True)
        there = (self.sample.row >= 0).sum(1, keepdim=True)

        def at(place: Tensor) -> Tensor:
            return order.gather(1, (place / self._bands * there).long().clamp(max=last))

        last = order.shape[1] - 1
        middle, edge = at(torch.arange(self._bands) + 0.5), at(torch.arange(1, self._bands))
        row, value = self.sample.row.gather(1, middle), self.sample.value.gather(1, middle)
        enough = there >= self._bands
        return row.where(enough, -1), value.where(enough, 0), self.sample.value.gather(1, edge)


class _Kept:
    """The firings of each latent that rank highest by some score."""

    def __init__(self, d_sae: int, size: int):
        self._score = torch.full((d_sae, size), -torch.inf)
        self.value = torch.zeros(d_sae, size)
        self.row = torch.full((d_sae, size), -1, dtype=torch.int64)

    def contends(self, latent: Tensor, score: Tensor) -> Bool[Tensor, " firings"]:
        """Which firings rank above the lowest that is kept of their latent: soon only a few."""
        return score > self._score[:, -1][latent]

    def add(self, latent: Tensor, score: Tensor, value: Tensor, row: Tensor) -> None:
        """Let firings compete for the places of their latents."""
        d_sae, size = self._score.shape
        contends = self.contends(latent, score)
        latent, score, value, row = (one[contends] for one in (latent, score, value, row))
        order = score.argsort(descending=True)
        order = order[latent[order].argsort(stable=True)]
        latent = latent[order]
        starts = torch.bincount(latent, minlength=d_sae).cumsum(0).roll(1)
        starts[0] = 0
        rank = torch.arange(len(latent)) - starts[latent]
        among = rank < size
        order, latent, rank = order[among], latent[among], rank[among]
        new = (
            torch.full((d_sae, size), -torch.inf),
            torch.zeros(d_sae, size),
            torch.full((d_sae, size), -1, dtype=torch.int64),
        )
        for table, column in zip(new, (score, value, row), strict=True):
            table[latent, rank] = column[order].to(table.dtype)
        both = [
            torch.cat(pair, 1)
            for pair in zip((self._score, self.value, self.row), new, strict=True)
        ]
        self._score, best = both[0].topk(size, dim=1)
        self.value, self.row = both[1].gather(1, best), both[2].gather(1, best)


def _strongest_of_each(latent: Tensor, context: Tensor, value: Tensor) -> Tensor:
    """For each latent and context, which firing is its strongest."""
    order = value.argsort(descending=True)
    pair = (latent[order] << 32) + context[order]
    by_pair = pair.argsort(stable=True)
    first = torch.ones(len(pair), dtype=torch.bool)
    first[1:] = pair[by_pair].diff() != 0
    return order[by_pair[first]]


@dataclass
class Windows:
    """The text around examples. Arrays [examples of all latents, positions]."""

    ids: Int[np.ndarray, "examples positions"]
    """Token ids; −1 where the text begins later or ends earlier."""
    activation: Float[np.ndarray, "examples positions"]
    """The latent's activations."""
    document: Sequence[str]
    """Name of each example's document, empty if it has none."""
    source: Int[np.ndarray, "examples sources"]
    """The dimensions that most of the activation at the centre comes from."""
    part: Float[np.ndarray, "examples sources"]
    """What they give: (x − mean)·W_enc of the one dimension."""


def windows(
    store: ActivationStore,
    dictionary: Dictionary,
    latents: Int[Tensor, " some"],
    rows: Int[Tensor, "some each"],
    floor: Float[Tensor, " rows"],
    before: int,
    after: int,
) -> Windows:
    """``before`` and ``after`` tokens around every example of some latents, with the latent's
    activations there; ``rows`` are the examples (−1 for none), ``floor`` is that of ``collect``.

    A latent's activation is its own pre-activation wherever the row's selection reaches as low.
    Where it comes from is counted from the mean row of the store.
    """
    per_latent = rows.shape[1]
    around = np.arange(-before, after + 1)
    ids = np.full((rows.numel(), len(around)), -1, dtype=np.int32)
    activation = np.zeros(ids.shape, dtype=np.float32)
    document = np.full(len(ids), NO_DOCUMENT)
    mean = store.statistics(dictionary.site).mean.float()
    sources = min(SOURCES, dictionary.d_in)
    source = np.zeros((len(ids), sources), dtype=np.int32)
    part = np.zeros((len(ids), sources), dtype=np.float32)
    names = {NO_DOCUMENT: ""}
    row, context = rows.flatten().numpy(), context_of_every_row(store)
    wanted = np.flatnonzero(row >= 0)
    wanted = wanted[np.argsort(row[wanted], kind="stable")]
    edges = np.flatnonzero(np.diff(context[row[wanted]], prepend=-1, append=-1))
    runs = list(pairwise(edges.tolist()))
    reader = store.reader(dictionary.site)
    for first, stop in tqdm(runs, desc="contexts", unit="ctx", unit_scale=True, leave=False):
        own = wanted[first:stop]
        number = int(context[row[own[0]]])
        shard, place = store.place_of_context(number)
        contexts = store.contexts(shard)
        kept = np.flatnonzero(contexts.keep[place])
        start = int(np.searchsorted(context, number))
        x = reader.rows(start, start + len(kept))
        theirs = latents[torch.from_numpy(own // per_latent)]
        encoder = dictionary.W_enc[:, theirs]
        given = ((x[row[own] - start].float() - mean) * encoder.T).topk(sources, dim=1)
        source[own], part[own] = given.indices, given.values
        values = np.zeros((len(own), store.context_size), dtype=np.float32)
        reach = torch.full((len(kept),), torch.inf)
        reach[: len(floor) - start] = floor[start : start + len(kept)]  # the last may be cut short
        values[:, kept] = activations_of(dictionary, x.float(), encoder, theirs, reach).T
        at = kept[row[own] - start]
        position = at[:, None] + around
        inside = (position >= 0) & (position < store.context_size)
        position = position.clip(0, store.context_size - 1)
        documents = contexts.document[place]
        inside &= documents[position] == documents[at][:, None]
        ids[own] = np.where(inside, contexts.ids[place][position], -1)
        activation[own] = np.where(inside, np.take_along_axis(values, position, 1), 0)
        document[own] = documents[at]
        for one in np.unique(documents[at]).tolist():
            names[one] = mapping(contexts.headers.get(one)).get("name") or ""
    return Windows(ids, activation, [names[one] for one in document.tolist()], source, part)


def activations_of(
    dictionary: Dictionary,
    x: Float[Tensor, "rows d_in"],
    encoder: Float[Tensor, "d_in some"],
    latents: Int[Tensor, " some"],
    floor: Float[Tensor, " rows"],
) -> Float[np.ndarray, "rows some"]:
    """Some latents' activations on rows whose smallest active values are known, from their columns
    of the encoder."""
    pre = torch.addmm(dictionary.b_enc[latents], x, encoder)
    if isinstance(dictionary.sparsity, TopK):
        active = pre >= floor[:, None] * (1 - _SLACK)
    else:
        lowest = torch.zeros(()) if dictionary.threshold is None else dictionary.threshold[latents]
        active = (pre > lowest) & floor[:, None].isfinite()
    return pre.where(active & (pre > 0), 0).numpy()
