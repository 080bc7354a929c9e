"""The firings of highest score of every latent, for whoever reads rows a piece at a time."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.data.store import ActivationStore


class Table(NamedTuple):
    """Firings of all latents, by descending score."""

    rows: Int[Tensor, "d_sae size"]  # −1 where there are not as many
    values: Float[Tensor, "d_sae size"]  # the latent's activations there


class Strongest:
    """Each latent's firings of the highest score; of each ``context``, if given, only one. Where
    scores tie, the earlier firing stays."""

    def __init__(self, d_sae: int, size: int, context: Int[Tensor, " rows"] | None = None):
        """``context`` is the number of every row's, on the device of the firings."""
        self._shape, self._context = (d_sae, size), context
        device = None if context is None else context.device
        whole = torch.empty(0, dtype=torch.int64, device=device)
        # as ``add`` takes them
        self._columns = [whole, whole.float(), whole.float(), whole]
        self._rank = whole
        self.lowest = torch.full((d_sae,), -torch.inf, device=device)
        """The lowest score that is kept of each latent; −∞ while there is room."""

    def add(self, latent: Tensor, score: Tensor, value: Tensor, row: Tensor) -> None:
        """Let firings compete for the places of their latents."""
        contends = score > self.lowest[latent]  # soon only a few
        new = [one[contends] for one in (latent, score, value, row)]
        columns = [torch.cat(pair) for pair in zip(self._columns, new, strict=True)]
        order = columns[1].argsort(descending=True, stable=True)
        order = order[columns[0][order].argsort(stable=True)]
        columns = [one[order] for one in columns]
        if self._context is not None:
            group, place = ((columns[0] << 32) + self._context[columns[3]]).sort(stable=True)
            first = torch.ones_like(group, dtype=torch.bool)
            first[place[1:]] = group[1:] != group[:-1]
            columns = [one[first] for one in columns]
        latent = columns[0]
        rank = torch.arange(len(latent), device=latent.device)
        rank -= torch.searchsorted(latent, latent)
        kept = rank < self._shape[1]
        self._columns, self._rank = [one[kept] for one in columns], rank[kept]
        last = self._rank == self._shape[1] - 1
        self.lowest[self._columns[0][last]] = self._columns[1][last]

    def table(self) -> Table:
        """What is kept."""
        latent, _, value, row = self._columns
        rows, values = row.new_full(self._shape, -1), value.new_zeros(self._shape)
        rows[latent, self._rank], values[latent, self._rank] = row, value
        return Table(rows, values)


def context_of_every_row(store: ActivationStore) -> Int[np.ndarray, " rows"]:
    """Number of the context that each row comes from."""
    parts = []
    for shard in range(len(store.manifest.shards)):
        own = np.nonzero(store.contexts(shard).keep)[0]
        parts.append(own + store.first_context(shard))
    return np.concatenate(parts).astype(np.int32)
