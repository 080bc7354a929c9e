"""Where given latents of a dictionary fire in an activation store; no model is needed.

One pass over the rows. A latent's pre-activation costs one column of the encoder, so it is computed
for every row, and the rows where it is largest are candidates. Whether a candidate fires may depend
on all other latents (TopK). So the complete dictionary encodes the candidates, best first, until
enough contexts are found. It also encodes evenly spread rows, from which the density is estimated.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.shard_reader import RowReader
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError

CANDIDATES = 4096
"""The most rows per latent that are encoded in search of its top contexts."""
SAMPLE_ROWS = 1 << 15
"""The fewest rows that the density is estimated from (or all rows of a smaller store)."""
_ROWS_AT_ONCE = 1 << 14
_LOOK_AT = 64


@dataclass(frozen=True)
class Firing:
    """What one latent does in a store."""

    density: float
    """Fraction of the rows looked at on which it fires."""
    rows_looked_at: int
    """Number of rows, evenly spread over the store, without massive activations."""
    mean_activation: float | None
    """Mean over those rows on which it fires; None if it never does."""
    rows: list[int]
    """Rows of its largest activations, each in a different context, in descending order."""
    values: list[float]
    """Its activations on these rows."""
    searched_all: bool
    """False if its candidates ran out before enough contexts were found: more may exist."""


def firings(
    store: ActivationStore, dictionary: Dictionary, latents: Int[Tensor, " latents"], top: int
) -> list[Firing]:
    """Density and ``top`` contexts of each latent.

    Raises UsageError if the store does not have the dictionary's site; LlmWsaeError if its rows
    are of another width or another model, or cannot be read.
    """
    check_store(store, dictionary)
    reader = store.reader(dictionary.site)
    search = _Search(dictionary, latents, max(1, store.num_rows // SAMPLE_ROWS))
    starts = range(0, store.num_rows, _ROWS_AT_ONCE)
    for start in tqdm(starts, desc="rows of the store", unit="tile", leave=False):
        stop = min(start + _ROWS_AT_ONCE, store.num_rows)
        search.look(start, reader.rows(start, stop).float())
    return [
        _firing(store, reader, dictionary, search, number, latent, top)
        for number, latent in enumerate(latents.tolist())
    ]


def check_store(store: ActivationStore, dictionary: Dictionary) -> None:
    """Raises LlmWsaeError if the store's rows cannot be the dictionary's."""
    if store.d_in != dictionary.d_in:
        raise LlmWsaeError(
            f"the store {store.folder} has rows of {store.d_in} dimensions, but the dictionary "
            f"reads {dictionary.d_in}; give the store of the model that it was trained on"
        )
    if dictionary.info.is_of_other_weights(store.manifest.model):
        raise LlmWsaeError(
            f"the store {store.folder} was made by {store.manifest.model.get('name')}, but the "
            f"dictionary was trained on {dictionary.info.model.get('name')} (other weights)"
        )


class _Search:
    """What one pass over the rows collects."""

    def __init__(self, dictionary: Dictionary, latents: Tensor, stride: int):
        self._dictionary = dictionary
        self._encoder = dictionary.W_enc[:, latents]
        self._bias = dictionary.b_enc[latents]
        self._stride = stride
        self._column = latents.new_full((dictionary.d_sae,), len(latents))
        self._column[latents] = torch.arange(len(latents))
        self.looked_at = 0
        self.count = torch.zeros(len(latents) + 1)  # the last entry is for all other latents
        self.total = torch.zeros(len(latents) + 1)
        self.best: Float[Tensor, "candidates latents"] = torch.empty(0, len(latents))
        self.row: Int[Tensor, "candidates latents"] = torch.empty(0, len(latents), dtype=torch.long)

    def look(self, start: int, x: Tensor) -> None:
        """Look at consecutive rows, the first of which has the number ``start``."""
        usable = not_massive(self._dictionary, x)
        pre = torch.addmm(self._bias, x, self._encoder)
        pre = pre.where(usable[:, None] & (pre > 0), -torch.inf)
        best, place = pre.topk(min(CANDIDATES, len(pre)), dim=0)
        best, row = torch.cat([self.best, best]), torch.cat([self.row, place + start])
        self.best, place = best.topk(min(CANDIDATES, len(best)), dim=0)
        self.row = row.gather(0, place)

        sample = x[-start % self._stride :: self._stride]
        sample = sample[usable[-start % self._stride :: self._stride]]
        codes = self._dictionary.encode_sparse(sample)
        column = self._column[codes.indices].flatten()
        values = codes.values.flatten()
        self.looked_at += len(sample)
        self.count.index_add_(0, column, (values > 0).float())
        self.total.index_add_(0, column, values)


def _firing(
    store: ActivationStore,
    reader: RowReader,
    dictionary: Dictionary,
    search: _Search,
    number: int,
    latent: int,
    top: int,
) -> Firing:
    count, total = float(search.count[number]), float(search.total[number])
    candidates = search.row[:, number][search.best[:, number] > 0]
    rows: list[int] = []
    values: list[float] = []
    contexts: set[int] = set()
    for part in candidates.split(_LOOK_AT):
        x = torch.empty(len(part), store.d_in, dtype=reader.dtype)
        for row, place in zip(part.tolist(), x[:, None], strict=True):
            reader.read(row, place)
        codes = dictionary.encode_sparse(x.float())
        value = (codes.values * (codes.indices == latent)).sum(1)
        context = store.locate(part).context
        for one in (value > 0).nonzero()[:, 0].tolist():
            if int(context[one]) not in contexts and len(rows) < top:
                contexts.add(int(context[one]))
                rows.append(int(part[one]))
                values.append(float(value[one]))
        if len(rows) == top:
            break
    return Firing(
        density=count / max(search.looked_at, 1),
        rows_looked_at=search.looked_at,
        mean_activation=total / count if count else None,
        rows=rows,
        values=values,
        searched_all=len(rows) == top or len(candidates) < CANDIDATES,
    )


def not_massive(dictionary: Dictionary, x: Float[Tensor, "rows d_in"]) -> Bool[Tensor, " rows"]:
    """Which rows are not massive activations."""
    threshold = dictionary.info.massive_threshold
    if threshold is None:
        return torch.ones(len(x), dtype=torch.bool)
    return x.norm(dim=1) <= threshold
