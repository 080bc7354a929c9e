"""The round trip: real codes z are decoded and encoded again, r = encode(decode(z)).

It is theorem 1 of Cui et al. 2026 (arXiv 2506.15963) with a trained dictionary as W_p and its own
codes as the true features. A latent *vanishes* where z > 0 and r = 0, *shrinks* where r < z, and is
*false* where r > 0 and z = 0.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.sparse.codes import Codes

_ROWS_AT_ONCE = 256  # made dense to compare them
MOSTLY = 0.5  # a latent vanishes mostly if it does on at least half of its firings


class RoundTripSums:
    """Streaming sums over pairs of codes, by latent: counts int64, strengths float64, on the
    CPU."""

    def __init__(self, d_sae: int):
        self.rows = 0
        self.fires = torch.zeros(d_sae, dtype=torch.int64)
        self.survives = torch.zeros(d_sae, dtype=torch.int64)
        self.alarms = torch.zeros(d_sae, dtype=torch.int64)
        self.lost = torch.zeros(d_sae, dtype=torch.float64)
        self._dense: Tensor | None = None
        """Zeros between calls; filling it anew for every few rows would cost more than the rest."""

    def update(self, z: Codes, r: Codes) -> None:
        """Add the codes of some rows, and what the round trip makes of them."""
        size = _ROWS_AT_ONCE
        parts = (
            z.indices.split(size),
            z.values.split(size),
            r.indices.split(size),
            r.values.split(size),
        )
        for z_indices, z_values, r_indices, r_values in zip(*parts, strict=True):
            self._add(Codes(z_indices, z_values), Codes(r_indices, r_values))

    def _add(self, z: Codes, r: Codes) -> None:
        d_sae = len(self.fires)
        fires = z.values > 0
        latent, before = z.indices[fires].cpu(), z.values[fires].cpu().double()
        after = self._at(r, z.indices)[fires].cpu().double()
        is_false = (r.values > 0) & (self._at(z, r.indices) == 0)
        both = after > 0
        self.rows += len(z.values)
        self.fires += torch.bincount(latent, minlength=d_sae)
        self.survives += torch.bincount(latent[both], minlength=d_sae)
        self.alarms += torch.bincount(r.indices[is_false].cpu(), minlength=d_sae)
        self.lost.index_add_(0, latent[both], 1 - after[both] / before[both])

    def _at(self, codes: Codes, latents: Int[Tensor, "rows k"]) -> Float[Tensor, "rows k"]:
        """The values that the codes give to these latents of each row, 0 where they do not name
        them."""
        if self._dense is None or self._dense.device != codes.values.device:
            self._dense = codes.values.new_zeros(_ROWS_AT_ONCE, len(self.fires))
        dense = self._dense[: len(codes.values)]
        dense.scatter_add_(1, codes.indices, codes.values)  # unused slots add 0
        found = dense.gather(1, latents)
        dense.scatter_(1, codes.indices, 0.0)
        return found

    @property
    def vanished(self) -> Float[Tensor, " d_sae"]:
        """P(r = 0 | z > 0) of every latent; NaN for one that never fires."""
        return 1 - self.survives.double() / _or_nan(self.fires)

    @property
    def shrunk(self) -> Float[Tensor, " d_sae"]:
        """E[(z − r)/z | both > 0] of every latent, below 0 where it grows; NaN for one that never
        survives."""
        return self.lost / _or_nan(self.survives)

    @property
    def false(self) -> Float[Tensor, " d_sae"]:
        """P(r > 0 | z = 0) of every latent; NaN for one that always fires."""
        return self.alarms.double() / _or_nan(self.rows - self.fires)

    @property
    def l0(self) -> float:
        """Mean number of active latents in a row, before the round trip."""
        return float(self.fires.sum()) / max(self.rows, 1)

    @property
    def vanished_share(self) -> float:
        """Of all firings, the share that vanishes; NaN without firings."""
        return float(1 - self.survives.sum() / _or_nan(self.fires.sum()))

    @property
    def mean_shrunk(self) -> float:
        """Mean of (z − r)/z over all firings that survive; NaN without any."""
        return float(self.lost.sum() / _or_nan(self.survives.sum()))

    @property
    def false_per_row(self) -> float:
        """Mean number of false latents in a row."""
        return float(self.alarms.sum()) / max(self.rows, 1)

    @property
    def mostly_vanished(self) -> float:
        """Of the latents that fire, the share that vanishes on at least half of its firings."""
        return float((self.vanished[self.fires > 0] >= MOSTLY).double().mean())


def _or_nan(count: Tensor) -> Tensor:
    """A count to divide by; NaN in the place of 0."""
    return torch.where(count > 0, count.double(), torch.nan)
