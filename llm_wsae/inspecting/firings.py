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
    return [search.firing(store, reader, n, one, top) for n, one in enumerate(latents.tolist())]


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
        self._dictionary, self._latents, self._stride = dictionary, latents, stride
        self._column = latents.new_full((dictionary.d_sae,), len(latents))
        self._column[latents] = torch.arange(len(latents))
        self._looked_at = 0
        self._count = torch.zeros(len(latents) + 1)  # the last entry is for all other latents
        self._total = torch.zeros(len(latents) + 1)
        self._best: Float[Tensor, "candidates latents"] = torch.empty(0, len(latents))
        self._row: Int[Tensor, "candidates latents"] = torch.empty(0, len(latents)).long()

    def look(self, start: int, x: Tensor) -> None:
        """Look at consecutive rows, the first of which has the number ``start``."""
        encoder = self._dictionary
        usable = not_massive(encoder, x)
        pre = torch.addmm(encoder.b_enc[self._latents], x, encoder.W_enc[:, self._latents])
        pre = pre.where(usable[:, None] & (pre > 0), -torch.inf)
        best, place = pre.topk(min(CANDIDATES, len(pre)), dim=0)
        best, row = torch.cat([self._best, best]), torch.cat([self._row, place + start])
        self._best, place = best.topk(min(CANDIDATES, len(best)), dim=0)
        self._row = row.gather(0, place)

        spread = slice(-start % self._stride, None, self._stride)
        sample = x[spread][usable[spread]]
        codes = encoder.encode_sparse(sample)
        column, values = self._column[codes.indices].flatten(), codes.values.flatten()
        self._looked_at += len(sample)
        self._count.index_add_(0, column, (values > 0).float())
        self._total.index_add_(0, column, values)

    def firing(
        self, store: ActivationStore, reader: RowReader, number: int, latent: int, top: int
    ) -> Firing:
        """What was found of a latent, the one at place ``number``."""
        candidates = self._row[:, number][self._best[:, number] > 0]
        found: dict[int, tuple[int, float]] = {}  # by context: its row and activation
        for part in candidates.split(_LOOK_AT):
            x = torch.empty(len(part), store.d_in, dtype=reader.dtype)
            for row, place in zip(part.tolist(), x[:, None], strict=True):
                reader.read(row, place)
            codes = self._dictionary.encode_sparse(x.float())
            value = (codes.values * (codes.indices == latent)).sum(1)
            context = store.locate(part).context
            for one in torch.where(value > 0)[0].tolist():
                if len(found) < top:
                    found.setdefault(int(context[one]), (int(part[one]), float(value[one])))
            if len(found) == top:
                break
        count, total = float(self._count[number]), float(self._total[number])
        return Firing(
            density=count / max(self._looked_at, 1),
            rows_looked_at=self._looked_at,
            mean_activation=total / count if count else None,
            rows=[row for row, _ in found.values()],
            values=[value for _, value in found.values()],
            searched_all=len(found) == top or len(candidates) < CANDIDATES,
        )


def not_massive(dictionary: Dictionary, x: Float[Tensor, "rows d_in"]) -> Bool[Tensor, " rows"]:
    """Which rows are not massive activations."""
    threshold = dictionary.info.massive_threshold
    if threshold is None:
        return torch.ones(len(x), dtype=torch.bool)
    return x.norm(dim=1) <= threshold
