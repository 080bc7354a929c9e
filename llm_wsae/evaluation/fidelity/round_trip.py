"""The round trip: real codes z are decoded and encoded again, r = encode(decode(z)).

It is theorem 1 of Cui et al. 2026 (arXiv 2506.15963) with a trained dictionary as W_p and its own
codes as the true features. A firing z > 0 *vanishes* where r = 0, and otherwise *shrinks* by
(z − r)/z. A latent is *false* where r > 0 and z = 0.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.sparse.codes import Codes

_ROWS_AT_ONCE = 256  # made dense to compare them


class RoundTripSums:
    """Streaming sums over pairs of codes: counts int64, strengths float64, on the CPU."""

    def __init__(self, d_sae: int):
        self.rows = 0
        self.fires = torch.zeros(d_sae, dtype=torch.int64)
        """Firings of every latent."""
        self.survivors = 0
        self.false = 0
        self.lost = torch.zeros(d_sae, dtype=torch.float64)
        """Of every latent, the sum of (z − r)/z over its firings that survive."""
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
        fires = z.values > 0
        latent, before = z.indices[fires].cpu(), z.values[fires].cpu().double()
        after = self._at(r, z.indices)[fires].cpu().double()
        survives = after > 0
        self.rows += len(z.values)
        self.fires += torch.bincount(latent, minlength=len(self.fires))
        self.survivors += int(survives.sum())
        self.false += int(((r.values > 0) & (self._at(z, r.indices) == 0)).sum())
        self.lost.index_add_(0, latent[survives], 1 - after[survives] / before[survives])

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
    def vanished_share(self) -> float:
        """Of all firings, the share that vanishes; NaN without firings."""
        firings = int(self.fires.sum())
        return 1 - self.survivors / firings if firings else float("nan")

    @property
    def mean_shrunk(self) -> float:
        """Mean of (z − r)/z over all firings that survive; NaN without any."""
        return float(self.lost.sum()) / self.survivors if self.survivors else float("nan")

    @property
    def false_per_row(self) -> float:
        """Mean number of false latents in a row."""
        return self.false / max(self.rows, 1)
