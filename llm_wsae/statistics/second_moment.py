"""The covariance of all rows of a site, massive ones excepted, for rules that whiten.

Sums about a mean merge exactly (Chan, Golub & LeVeque 1983). The row sample of ``moments`` is too
small for this: the smallest eigenvalues of a covariance of 8192 rows are far too small, and
whitening amplifies just those.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import LlmWsaeError

_CHUNK_ROWS, _CACHED_ROWS = 4096, 256
_FEW = 4  # rows for each dimension


class SecondMoment:
    """Count, mean and Σ (x − mean)(x − mean)ᵀ of rows, float64."""

    def __init__(self, d_in: int):
        self.count = 0
        self.mean = torch.zeros(d_in, dtype=torch.float64)
        self._scatter = torch.zeros(d_in, d_in, dtype=torch.float64)

    def update(self, rows: Float[Tensor, "rows d_in"]) -> "SecondMoment":
        """Add rows, if there are any. Returns self. Raises LlmWsaeError when they hold NaN or
        infinity, or have another number of dimensions."""
        if not len(rows):  # which split would turn into one empty chunk
            return self
        if rows.shape[-1] != len(self.mean):
            raise LlmWsaeError(f"rows have {rows.shape[-1]} dimensions, not {len(self.mean)}")
        for chunk in rows.split(_CHUNK_ROWS):
            # Products of a chunk in float32, about its own mean, err by 1e-7 of the product of two
            # standard deviations, and chunks err independently; sums over chunks are exact.
            mean, scatter = _sums(chunk.float())
            if not bool(scatter.diagonal().isfinite().all()):  # or the square of a number is not
                mean, scatter = _sums(chunk.double())
                if not bool(scatter.diagonal().isfinite().all()):
                    raise LlmWsaeError("rows hold NaN or infinite activations")
            self._add(len(chunk), mean, scatter)
        return self

    def merge(self, other: "SecondMoment") -> "SecondMoment":
        """Add the sums of other rows of the same site. Returns self."""
        if other.count:
            self._add(other.count, other.mean, other._scatter)
        return self

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total, delta = self.count + count, mean - self.mean
        self._scatter += scatter
        self._scatter.addr_(delta, delta, alpha=self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def covariance(self) -> Float[Tensor, "d_in d_in"]:
        """The covariance of these rows, not shrunk."""
        return self._scatter / max(self.count, 1)

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything as tensors, for a safetensors file."""
        return {"count": torch.tensor([self.count]), "mean": self.mean, "scatter": self._scatter}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "SecondMoment":
        """The inverse of ``to_tensors``."""
        new = cls(0)
        new.count, new.mean = int(tensors["count"]), tensors["mean"]
        new._scatter = tensors["scatter"]
        return new


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sums about it, float64. Those of a constant dimension are exactly 0."""
    mean = _mean(x).to(x.dtype)
    x = x - mean
    off = _mean(x)  # what rounding the mean left
    scatter = (x.T @ x).double()
    return mean.double() + off, scatter.addr_(off, off, alpha=-len(x))


def _mean(x: Tensor) -> Tensor:
    # Converted in cache, it takes a seventh of the time.
    sums = [part.double().sum(0) for part in x.split(_CACHED_ROWS)]
    return torch.stack(sums).sum(0) / len(x)


def shrunk(covariance: Float[Tensor, "d_in d_in"], rows: int) -> Float[Tensor, "d_in d_in"]:
    """(1 − ρ)Σ + ρ·tr(Σ)/d·I for a covariance Σ that was measured on ``rows`` rows.

    ρ is the oracle approximating shrinkage of scikit-learn (Chen, Wiesel, Eldar & Hero 2010), which
    takes the rows themselves; with a million rows of 576 dimensions it is about 1e-5. Beside it,
    Ledoit and Wolf's shrinks too much where a few rows are strong (docs/log.md).

    ρ is inversely proportional to the number of rows plus one. Of nearly equal eigenvalues, which
    whitening would not change, it is that of few rows in this proportion, not 1.
    """
    d_in = len(covariance)
    few = max(d_in, min(rows, _FEW * d_in))
    mean, square = covariance.trace() / d_in, covariance.square().mean()
    spread = square - mean**2 / d_in
    rho = 1.0
    if spread > 0:
        rho = min(1.0, float((square + mean**2) / (few + 1) / spread)) * (few + 1) / (rows + 1)
    new = (1 - rho) * covariance
    new.diagonal().add_(rho * mean)
    return new
