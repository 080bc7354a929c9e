"""Where every latent of several dictionaries fires in a store: one pass over the rows.

Of each latent its largest activations, each of another context, and a random sample of the others
are kept, and 4 bytes a row and dictionary. The rows of contexts with examples are read once more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix
from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.packing import NO_DOCUMENT, Contexts
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.sparsity import TopK
from llm_wsae.inspecting.directions import check_store, not_massive
from llm_wsae.inspecting.strongest import Strongest, context_of_every_row

ROWS_AT_ONCE = 1 << 14
BINS_PER_OCTAVE, OCTAVES = 2, 6  # of the histograms, below and above the median activation
SAMPLE = 5  # firings sampled for each band
TOGETHER_ROWS = 1 << 17  # evenly spread, for labels and to count which latents fire together
NEIGHBOURS = 5
SOURCES = 3  # dimensions named as the source of an activation
ROLES = ("", "system", "user", "assistant", "model", "tool", "developer")  # in conversations
_LATENTS_AT_ONCE = 256  # whose firings together with all others are counted at once
_SLACK = 1e-5  # relative, between two float32 ways to the same pre-activation


class Firings:
    """What the latents of one dictionary do in a store. Rows are numbers in the store, −1 where
    there are not as many. ``look`` at all rows, then ``finish``."""

    rows_seen = 0
    """Rows without massive activations."""
    floor: Float[Tensor, " rows"]  # smallest active value of every row; infinite on massive rows
    count: Int[Tensor, " d_sae"]  # rows on which each latent fires
    total: Float[Tensor, " d_sae"]  # sum of its activations
    histogram: Int[Tensor, "d_sae bins"]  # its activations by size, in bins of half an octave
    first_edge: float  # lower edge of the second bin; the first and the last bin are open
    row: Int[Tensor, "d_sae examples"]  # top rows, then one of each band (−1: a top row)
    value: Float[Tensor, "d_sae examples"]  # its activations on those rows
    edges: Float[Tensor, "d_sae edges"]  # of its bands, from its largest activation down to 0
    together: Int[Tensor, "d_sae neighbours"]  # latents that fire with it most often
    overlap: Float[Tensor, "d_sae neighbours"]  # rows where both fire, of those of either
    sample: Int[np.ndarray, " some"]  # evenly spread rows
    firings: tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]
    """Of every firing in the sample: the place of its row there, and the latent."""

    def __init__(self, dictionary: Dictionary, context: Int[Tensor, " rows"], top: int, bands: int):
        self._dictionary, self._bands = dictionary, bands
        d_sae = dictionary.d_sae
        self.floor = torch.full((len(context),), torch.inf)
        self.count = torch.zeros(d_sae, dtype=torch.int64)
        self.total = torch.zeros(d_sae, dtype=torch.float64)
        self.histogram = torch.zeros(d_sae, 2 * OCTAVES * BINS_PER_OCTAVE, dtype=torch.int64)
        self._middle: float | None = None
        self._best, self._sample = Strongest(d_sae, top, context), Strongest(d_sae, bands * SAMPLE)
        self._stride = max(1, len(context) // TOGETHER_ROWS)
        self.sample = np.arange(0, len(context), self._stride)
        self._pairs = [torch.empty(2, 0, dtype=torch.int32)]

    def look(self, start: int, x: Tensor) -> None:
        """Look at consecutive rows, the first of which has the number ``start``."""
        usable = torch.where(not_massive(self._dictionary, x))[0]
        codes = self._dictionary.encode_sparse(x[usable])
        active = codes.values > 0
        self.floor[start + usable] = codes.values.where(active, torch.inf).amin(1)
        self.rows_seen += len(usable)
        latent, value = codes.indices[active], codes.values[active]
        row = start + usable[:, None].expand_as(active)[active]
        if len(latent) == 0:
            return
        self.count += torch.bincount(latent, minlength=len(self.count))
        self.total.index_add_(0, latent, value.double())
        if self._middle is None:
            self._middle = float(value.median())
        octave = (value / self._middle).log2().add(OCTAVES).mul(BINS_PER_OCTAVE)
        bins = self.histogram.shape[1]
        cell = latent * bins + octave.long().clamp(0, bins - 1)
        self.histogram.view(-1).add_(torch.bincount(cell, minlength=self.histogram.numel()))
        sampled = row % self._stride == 0
        self._pairs.append(torch.stack([row[sampled] // self._stride, latent[sampled]]).int())
        self._best.add(latent, value, value, row)
        draw = torch.Generator().manual_seed(start)
        self._sample.add(latent, torch.rand(len(value), generator=draw), value, row)

    def finish(self) -> "Firings":
        """Choose the examples, and count what fires together."""
        row, value = self._best.table()
        bands_row, bands_value, edges = self._of_bands()
        repeated = (bands_row[:, :, None] == row[:, None, :]).any(2)
        bands_row, bands_value = bands_row.where(~repeated, -1), bands_value.where(~repeated, 0)
        self.row, self.value = torch.cat([row, bands_row], 1), torch.cat([value, bands_value], 1)
        self.edges = torch.cat([value[:, :1], edges, torch.zeros_like(value[:, :1])], 1)
        self.total = self.total.float()
        self.first_edge = (self._middle or 1.0) * 2 ** (1 / BINS_PER_OCTAVE - OCTAVES)
        rows, latents = torch.cat(self._pairs, 1).numpy()
        self.firings = rows, latents
        self.together, self.overlap = self._together()
        del self._best, self._sample, self._pairs  # larger than what was chosen
        return self

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of the rows on which each latent fires."""
        return self.count / max(self.rows_seen, 1)

    def _together(self) -> tuple[Tensor, Tensor]:
        rows, latents = self.firings
        shape = (len(self.sample), len(self.count))
        fires = csr_matrix((np.ones(len(rows), dtype=np.float32), (rows, latents)), shape=shape)
        often = torch.from_numpy(np.asarray(fires.sum(0)).ravel())
        by_latent = fires.T.tocsr()
        found = []
        for start in range(0, len(often), _LATENTS_AT_ONCE):
            both = torch.from_numpy((by_latent[start : start + _LATENTS_AT_ONCE] @ fires).toarray())
            own = torch.arange(len(both))
            share = both / (often[start + own, None] + often - both).clamp(min=1)
            share[own, start + own] = 0
            found.append(share.topk(min(NEIGHBOURS, len(often)), dim=1))
        return torch.cat([one.indices for one in found]), torch.cat([one.values for one in found])

    def _of_bands(self) -> tuple[Tensor, Tensor, Tensor]:
        """One sampled firing from the middle of each band, the strongest band first, and the
        activations between one band and the next."""
        row, value = self._sample.table()
        order = value.where(row >= 0, -1).argsort(dim=1, descending=True)
        there = (row >= 0).sum(1, keepdim=True)

        def at(place: Tensor) -> Tensor:
            last = order.shape[1] - 1
            return order.gather(1, (place / self._bands * there).long().clamp(max=last))

        middle, edge = at(torch.arange(self._bands) + 0.5), at(torch.arange(1, self._bands))
        enough = there >= self._bands
        shown = row.gather(1, middle).where(enough, -1), value.gather(1, middle).where(enough, 0)
        return *shown, value.gather(1, edge)


def collect(
    store: ActivationStore,
    dictionaries: Mapping[str, Dictionary],
    top: int,
    bands: int,
    most_rows: int | None = None,
) -> dict[str, Firings]:
    """What every dictionary's latents do in the first rows, or all. Raises LlmWsaeError if the
    store's rows cannot be a dictionary's, or cannot be read."""
    (site,) = {dictionary.site.reads for dictionary in dictionaries.values()}
    for dictionary in dictionaries.values():
        check_store(store, dictionary)
    reader = store.reader(site)
    num_rows = min(store.num_rows, most_rows or store.num_rows)
    context = torch.from_numpy(context_of_every_row(store)[:num_rows])
    found = {name: Firings(one, context, top, bands) for name, one in dictionaries.items()}
    with tqdm(total=num_rows, desc="encode", unit="row", unit_scale=True) as bar:
        for start in range(0, num_rows, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, num_rows)
            rows = reader.rows(start, stop).float()
            for one in found.values():
                one.look(start, rows)
            bar.update(stop - start)
    return {name: one.finish() for name, one in found.items()}


def role_of_every_row(store: ActivationStore, tokenizer: Any) -> Int[np.ndarray, " rows"]:
    """Who says the token of each row, as a place in ``ROLES``: in a conversation, the role
    that stood last behind a special token, as the marks of a chat template have it."""
    if tokenizer is None:
        return np.zeros(store.num_rows, dtype=np.int8)
    named = {
        first: place
        for place, role in enumerate(ROLES)
        for first in tokenizer(role, add_special_tokens=False)["input_ids"][:1]
    }
    said, whose, parts = 0, NO_DOCUMENT, []
    for shard in range(len(store.manifest.shards)):
        contexts = store.contexts(shard)
        inside = contexts.document != NO_DOCUMENT
        ids, document = contexts.ids[inside], contexts.document[inside]
        marks = np.isin(ids[:-1], tokenizer.all_special_ids) & np.isin(ids[1:], [*named])
        marks &= document[:-1] == document[1:]
        own = np.zeros(len(ids), dtype=np.int8)
        for first, stop in pairwise([0, *(1 + np.flatnonzero(marks)).tolist(), len(ids)]):
            if first:  # else the last role of the shard before goes on
                said, whose = named[int(ids[first])], int(document[first])
            own[first:stop] = said * (document[first:stop] == whose)
        every = np.zeros(inside.shape, dtype=np.int8)
        every[inside] = own
        parts.append(every[contexts.keep])
    return np.concatenate(parts)


@dataclass
class Windows:
    """The text around examples. Arrays [examples of all latents, positions]."""

    ids: Int[np.ndarray, "examples positions"]  # token ids; −1 beyond the text
    activation: Float[np.ndarray, "examples positions"]  # the latent's activations
    document: Sequence[str]  # name of each example's document, empty if it has none
    source: Int[np.ndarray, "examples sources"]  # dimensions that give most at the centre
    part: Float[np.ndarray, "examples sources"]  # what they give: (x − mean)·W_enc

    def run(self, example: int) -> slice:
        """The positions that hold text, around the centre."""
        there = np.flatnonzero(self.ids[example] >= 0)
        return slice(int(there[0]), int(there[-1]) + 1)


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
    activations there and where they come from, counted from the mean row of the store. ``rows`` are
    the examples (−1 for none), ``floor`` is that of ``Firings``."""
    around = np.arange(-before, after + 1)
    ids = np.full((rows.numel(), len(around)), -1, dtype=np.int32)
    activation = np.zeros(ids.shape, dtype=np.float32)
    names = [""] * len(ids)
    mean = store.statistics(dictionary.site.reads).mean.float()
    sources = min(SOURCES, dictionary.d_in)
    source = np.zeros((len(ids), sources), dtype=np.int32)
    part = np.zeros((len(ids), sources), dtype=np.float32)
    row, context = rows.flatten().numpy(), context_of_every_row(store)
    wanted = np.flatnonzero(row >= 0)
    wanted = wanted[np.argsort(row[wanted], kind="stable")]
    edges = np.flatnonzero(np.diff(context[row[wanted]], prepend=-1, append=-1))
    runs = list(pairwise(edges.tolist()))
    reader = store.reader(dictionary.site.reads)
    for first, stop in tqdm(runs, desc="contexts", unit="ctx", unit_scale=True, leave=False):
        own = wanted[first:stop]
        contexts, place, kept, start = place_of(store, context, int(context[row[own[0]]]))
        x = reader.rows(start, start + len(kept))
        theirs = latents[torch.from_numpy(own // rows.shape[1])]
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
        for example, document in zip(own.tolist(), documents[at].tolist(), strict=True):
            names[example] = contexts.headers.get(document, {}).get("name") or ""
    return Windows(ids, activation, names, source, part)


def place_of(
    store: ActivationStore, context: Int[np.ndarray, " rows"], number: int
) -> tuple[Contexts, int, Int[np.ndarray, " kept"], int]:
    """Where a context is: its shard's contexts and the place among them, the positions that have
    rows, and their first row; ``context`` is that of every row."""
    shard, place = store.place_of_context(number)
    contexts = store.contexts(shard)
    kept = np.flatnonzero(contexts.keep[place])
    return contexts, place, kept, int(np.searchsorted(context, number))


def activations_of(
    dictionary: Dictionary,
    x: Float[Tensor, "rows d_in"],
    encoder: Float[Tensor, "d_in some"],
    latents: Int[Tensor, " some"],
    floor: Float[Tensor, " rows"],
) -> Float[np.ndarray, "rows some"]:
    """Some latents' activations, from their columns of the encoder: their pre-activations wherever
    the row's selection (its ``floor``) reaches as low."""
    pre = torch.addmm(dictionary.b_enc[latents], x, encoder)
    if isinstance(dictionary.sparsity, TopK):
        active = pre >= floor[:, None] * (1 - _SLACK)
    else:
        lowest = torch.zeros(()) if dictionary.threshold is None else dictionary.threshold[latents]
        active = (pre > lowest) & floor[:, None].isfinite()
    return pre.where(active & (pre > 0), 0).numpy()
