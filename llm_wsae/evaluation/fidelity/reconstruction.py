"""Streaming sums behind the reconstruction measures, in float64.

Massive rows (``massive_thresholds``) are summed separately: a handful of them would dominate every
mean, and training leaves them out. FVU is reported both without and with them.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.dictionary.dictionary import DENSE_DENSITY, Dictionary
from llm_wsae.evaluation.fidelity.round_trip import RoundTripSums

_TOGETHER = 512  # rows in float64 at a time, which stay in a CPU's cache
HISTOGRAM_LOW, HISTOGRAM_STEP = -7.0, 0.25  # log10 of the density


class Moments:
    """Count, sum and squared sum of rows about a fixed centre, which avoids cancellation."""

    def __init__(self, centre: Float[Tensor, " d_in"]):
        self.centre = centre
        self.count = 0
        self.sum = torch.zeros_like(centre)
        self.square = torch.zeros_like(centre)

    def update(self, rows: Float[Tensor, "rows d_in"]) -> None:
        """Add rows."""
        x = exact(rows) - self.centre
        self.count += len(x)
        self.sum += x.sum(0)
        self.square += x.square().sum(0)

    def deviation(self, other: "Moments | None" = None) -> Float[Tensor, " d_in"]:
        """Σ (x − mean)² of every dimension, over these rows or over these and ``other``'s."""
        count, total, square = self.count, self.sum, self.square
        if other is not None:
            count, total, square = count + other.count, total + other.sum, square + other.square
        return square - total.square() / max(count, 1)


class ReconstructionSums:
    """Sums over one dictionary's reconstructions of the rows of its site."""

    def __init__(self, d_in: int, d_sae: int):
        self.count = 0
        self.error = torch.zeros(d_in, dtype=torch.float64)
        self.massive_error = torch.zeros(d_in, dtype=torch.float64)
        self.cosine = 0.0
        self.l2_ratio = 0.0
        self.round_trip = RoundTripSums(d_sae)

    @torch.no_grad()
    def update(
        self, dictionary: Dictionary, rows: Float[Tensor, "rows d_in"]
    ) -> Float[Tensor, "rows d_in"]:
        """Reconstruct rows, add them to every sum, and return the reconstruction."""
        codes = dictionary.encode_sparse(rows)
        reconstruction = dictionary.decode(codes)
        for x, y in zip(rows.split(_TOGETHER), reconstruction.split(_TOGETHER), strict=True):
            self._compare(exact(x), exact(y))
        self.round_trip.update(codes, dictionary.encode_sparse(reconstruction))
        return reconstruction

    def _compare(self, x: Tensor, y: Tensor) -> None:
        self.count += len(x)
        self.error += (x - y).square().sum(0)
        norm_x, norm_y = x.norm(dim=1), y.norm(dim=1)
        # The bound only guards the quotient of an all-zero row.
        self.cosine += float(((x * y).sum(1) / (norm_x * norm_y).clamp(min=1e-300)).sum())
        self.l2_ratio += float((norm_y / norm_x.clamp(min=1e-300)).sum())

    @torch.no_grad()
    def update_massive(
        self, dictionary: Dictionary, rows: Float[Tensor, "rows d_in"]
    ) -> Float[Tensor, "rows d_in"]:
        """The same for massive rows, which only count in ``massive_error``."""
        reconstruction = dictionary(rows)
        self.massive_error += (exact(rows) - exact(reconstruction)).square().sum(0)
        return reconstruction

    @property
    def firings(self) -> Int[Tensor, " d_sae"]:
        """Rows on which each latent fires."""
        return self.round_trip.fires

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of the rows on which each latent fires."""
        return self.firings.double() / max(self.count, 1)

    @property
    def l0(self) -> float:
        """Mean number of active latents in a row."""
        return float(self.density.sum())

    @property
    def dead_share(self) -> float:
        """Share of latents that never fired."""
        return float((self.firings == 0).double().mean())

    @property
    def dense_share(self) -> float:
        """Share of latents that fire on more than 10 % of the rows."""
        return float((self.density > DENSE_DENSITY).double().mean())

    def histogram(self) -> tuple[list[float], list[int]]:
        """Histogram of log10 density over the latents that fired: (bin edges, counts)."""
        bins = round(-HISTOGRAM_LOW / HISTOGRAM_STEP)
        alive = self.density[self.firings > 0].log10()
        at = ((alive - HISTOGRAM_LOW) / HISTOGRAM_STEP).floor().long().clamp(0, bins - 1)
        edges = [HISTOGRAM_LOW + HISTOGRAM_STEP * i for i in range(bins + 1)]
        return edges, torch.bincount(at, minlength=bins).tolist()


def exact(tensor: Tensor) -> Tensor:
    """The tensor in float64 on the CPU (not every accelerator has float64)."""
    return tensor.detach().cpu().double()


def ratio(error: Tensor, deviation: Tensor) -> float:
    """Σ error / Σ deviation: the fraction of variance unexplained; NaN for constant rows."""
    total = float(deviation.sum())
    return float(error.sum()) / total if total > 0 else math.nan
