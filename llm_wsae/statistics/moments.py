"""Streaming statistics of a site's rows: what every weight rule and every trainer starts from.

One pass over the rows fills three things, each of which merges exactly with that of other rows:

- the first four central moments, minimum and maximum of every dimension, in float64 (Pébay 2008);
- a histogram of the rows' norms by position in the context, which finds the massive activations
  (Sun et al. 2024): a handful of rows, mostly at the first positions, hundreds of times larger
  than the rest, which would dominate every plain moment;
- a uniform sample of rows, from which anything non-linear is computed, above all the winsorised
  variance, which those rows cannot distort.
"""

import math
import zlib

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.errors import LlmWsaeError

MASSIVE_RATIO = 10.0  # a row is massive when its norm exceeds this many median norms
SAMPLE_ROWS = 8192
WINSOR_TAIL = 0.005  # share of the sample clipped at each end of every dimension

_BINS_PER_OCTAVE = 16
_MIN_OCTAVE, _MAX_OCTAVE = -24, 40
_NUM_BINS = (_MAX_OCTAVE - _MIN_OCTAVE) * _BINS_PER_OCTAVE
_SINGLE_POSITIONS = 16  # positions kept apart; later ones share a bucket per octave
_CHUNK_ROWS = 512  # the copies made during an update stay in cache
_PRODUCT_ROWS, _CACHED_ROWS = 4096, 256  # of a second moment
_FEW = 4  # rows for each dimension
_SAVED = (
    *("_m2", "_m3", "_m4", "_norms", "_sample", "mean", "minimum", "maximum"),
    "_sample_priority",
)


class Statistics:
    """Statistics of rows of width ``d_in`` taken from contexts of ``context_size`` positions."""

    def __init__(self, d_in: int, context_size: int, sample_rows: int = SAMPLE_ROWS):
        self.d_in = d_in
        self.context_size = context_size
        self.sample_rows = sample_rows
        self.count = 0
        zeros = (torch.zeros(d_in, dtype=torch.float64) for _ in range(4))
        self.mean, self._m2, self._m3, self._m4 = zeros
        self.minimum = torch.full((d_in,), math.inf, dtype=torch.float64)
        self.maximum = torch.full((d_in,), -math.inf, dtype=torch.float64)
        buckets = int(_bucket_of(torch.tensor([max(context_size - 1, 0)]))) + 1
        self._norms = torch.zeros(buckets, _NUM_BINS, dtype=torch.int64)
        self._sample = torch.empty(0, d_in)
        self._sample_priority = torch.empty(0, dtype=torch.float64)
        self._sample_limit = 1.0  # the sample holds every row whose priority is below this
        self._of_sample: dict[str, Tensor] = {}  # computed from the sample; empty when it changes

    def update(
        self, rows: Float[Tensor, "rows d_in"], positions: Int[Tensor, " rows"]
    ) -> "Statistics":
        """Add rows, with the position of each in its context. Returns self. Raises LlmWsaeError
        when the rows have another width or hold NaN or infinity."""
        if rows.shape[1] != self.d_in:
            raise LlmWsaeError(f"rows have {rows.shape[1]} dimensions, expected {self.d_in}")
        if len(rows) == 0:
            return self
        rows, positions = rows.cpu(), positions.cpu()
        bins = ((_norms(rows).clamp(min=1e-30).log2() - _MIN_OCTAVE) * _BINS_PER_OCTAVE).floor()
        cells = _bucket_of(positions) * _NUM_BINS + bins.long().clamp(0, _NUM_BINS - 1)
        self._add_to_sample(rows)
        self._norms += cells.bincount(minlength=self._norms.numel()).view_as(self._norms)
        for chunk in rows.split(_CHUNK_ROWS):
            self._update_moments(chunk)
        return self

    def _update_moments(self, rows: Tensor) -> None:
        # Within a chunk float32 is exact enough for rows that were float32 or less themselves, and
        # twice as fast while a forward pass uses every core; chunks add up in float64.
        x = rows if rows.dtype == torch.float64 else rows.float()
        self.minimum = torch.minimum(self.minimum, x.amin(0).double())
        self.maximum = torch.maximum(self.maximum, x.amax(0).double())
        mean = x.mean(0)
        x = x - mean  # not in place: the rows are the caller's
        square = x * x
        m2 = square.sum(0).double()
        m3 = x.mul_(square).sum(0).double()
        m4 = square.mul_(square).sum(0).double()
        if x.dtype != torch.float64 and not bool(m4.isfinite().all()):
            self._update_moments(rows.double())
            return
        self._merge_moments(len(rows), mean.double(), m2, m3, m4)

    def merge(self, other: "Statistics") -> "Statistics":
        """Add the statistics of other rows of the same site. Returns self."""
        assert (self.d_in, self._norms.shape) == (other.d_in, other._norms.shape)
        self._merge_moments(other.count, other.mean, other._m2, other._m3, other._m4)
        self.minimum = torch.minimum(self.minimum, other.minimum)
        self.maximum = torch.maximum(self.maximum, other.maximum)
        self._norms += other._norms
        self._sample_limit = min(self._sample_limit, other._sample_limit)
        self._keep_sample(other._sample, other._sample_priority)
        return self

    def _merge_moments(self, n_b: int, mean_b: Tensor, m2_b: Tensor, m3_b: Tensor, m4_b: Tensor):
        if n_b == 0:
            return
        n_a, n, m2_a, m3_a = self.count, self.count + n_b, self._m2, self._m3
        delta = mean_b - self.mean
        d_n = delta / n
        # Products of counts outgrow the integers that torch accepts.
        product, squares = float(n_a * n_b), (float(n_a * n_a), float(n_b * n_b))
        last = float(n_a * n_b * (n_a * n_a - n_a * n_b + n_b * n_b))
        self._m4 = self._m4 + m4_b + delta * d_n**3 * last
        self._m4 += 6 * d_n**2 * (squares[0] * m2_b + squares[1] * m2_a)
        self._m4 += 4 * d_n * (n_a * m3_b - n_b * m3_a)
        self._m3 = m3_a + m3_b + delta * d_n**2 * product * (n_a - n_b)
        self._m3 += 3 * d_n * (n_a * m2_b - n_b * m2_a)
        self._m2 = m2_a + m2_b + delta * d_n * product
        self.mean = self.mean + d_n * n_b
        self.count = n

    def _add_to_sample(self, rows: Tensor) -> None:
        # Seeded by the data, so that the same rows give the same sample, and two parts that are
        # merged later draw different priorities; by all rows, since many texts begin alike.
        every = zlib.crc32(rows.float().numpy().tobytes())
        generator = torch.Generator().manual_seed(((self.count << 32) + every) % 2**63)
        priority = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        self._keep_sample(rows, priority)

    def _keep_sample(self, rows: Tensor, priority: Tensor) -> None:
        self._of_sample = {}  # the massive threshold may change even if no row is added
        chosen = priority < self._sample_limit
        sample = torch.cat([self._sample.to(rows.dtype), rows[chosen]])
        priority = torch.cat([self._sample_priority, priority[chosen]])
        keep = priority < self._sample_limit
        sample, priority = sample[keep], priority[keep]
        if len(sample) > self.sample_rows:
            lowest, order = priority.topk(self.sample_rows + 1, largest=False)
            self._sample_limit = float(lowest[-1])
            order = order[lowest < self._sample_limit].sort().values
            sample, priority = sample[order], priority[order]
        self._sample, self._sample_priority = sample, priority

    @property
    def sample(self) -> Float[Tensor, "sample d_in"]:
        """A uniform sample of the rows, all of them as long as they are few, in float32."""
        return self._sample.float()

    @property
    def usual_sample(self) -> Float[Tensor, "sample d_in"]:
        """The sample without its massive rows, in float32."""
        sample = self.sample
        return sample[sample.norm(dim=1) <= self.massive_threshold]

    @property
    def variance(self) -> Float[Tensor, " d_in"]:
        """Variance of every dimension over all rows, massive ones too; 0 of constants; float64."""
        # The mean of equal numbers is rounded, so their sums of squares are not quite 0.
        return torch.where(self.maximum > self.minimum, self._m2 / max(self.count, 1), 0.0)

    @property
    def excess_kurtosis(self) -> Float[Tensor, " d_in"]:
        """Fourth standardised moment minus 3; −3 for a constant dimension."""
        return ratio(self._m4 / max(self.count, 1), self.variance**2) - 3

    @property
    def robust_variance(self) -> Float[Tensor, " d_in"]:
        """Variance without massive rows, every dimension clipped at its 0.5 % and 99.5 % quantiles:
        winsorised over the row sample, with a relative standard error of about 2 % (float64)."""
        if "variance" not in self._of_sample:
            self._of_sample["variance"] = self._winsorised().square().mean(0)
        return self._of_sample["variance"]

    @property
    def robust_covariance(self) -> Float[Tensor, "d_in d_in"]:
        """The covariance of the same sample, with ``robust_variance`` on its diagonal (float64).
        The relative error of its eigenvalues is about √(d_in / sample), 26 % for 576 dimensions."""
        if "covariance" not in self._of_sample:
            centred = self._winsorised()
            self._of_sample["covariance"] = centred.T @ centred / len(centred)
        return self._of_sample["covariance"]

    def _winsorised(self) -> Float[Tensor, "sample d_in"]:
        """The usual rows, clipped and centred, in float64; one row of zeros if there are none."""
        sample = self.usual_sample
        if len(sample) == 0:
            return torch.zeros(1, self.d_in, dtype=torch.float64)
        tail = int(WINSOR_TAIL * (len(sample) - 1))
        ends = (tail, len(sample) - 1 - tail)
        order = np.partition(sample.T.contiguous().numpy(), ends, axis=1)  # a sort takes 5 × longer
        low, high = (torch.from_numpy(order[:, end]) for end in ends)
        clipped = sample.clamp(low, high).double()
        return clipped - clipped.mean(0)

    def check_varying(self) -> None:
        """Raise LlmWsaeError unless the usual rows vary in some dimension."""
        if bool((self.robust_variance > 0).any()):
            return
        if len(self._sample) and not len(self.usual_sample):
            raise LlmWsaeError(
                f"most rows are longer than {self.massive_threshold:.0e}, as no model's are; load "
                "the model in float32 (--model-dtype float32) and harvest again"
            )
        raise LlmWsaeError(
            "there is nothing to learn: apart from a few, the rows do not vary in any dimension; "
            "take other rows, from another text or site"
        )

    @property
    def median_norm(self) -> float:
        """Median Euclidean norm of the rows, to within 2 %; 0 before any row was seen."""
        if self.count == 0:
            return 0.0
        reached = self._norms.sum(0).cumsum(0) >= (self.count + 1) // 2
        return _bin_edge(int(reached.int().argmax()) + 0.5)

    @property
    def massive_threshold(self) -> float:
        """Norm above which a row counts as a massive activation: ten median norms."""
        return _bin_edge(float(self._massive_bin()))

    @property
    def massive_count(self) -> int:
        """Number of rows above ``massive_threshold``."""
        return int(self._norms[:, self._massive_bin() :].sum())

    def same_are_massive(self, threshold_of: "Statistics") -> bool:
        """Whether the threshold of other statistics leaves out the same ones of these rows. (A norm
        at the edge of a bin may be rounded across it.)"""
        low, high = sorted((self._massive_bin(), threshold_of._massive_bin()))
        return low == high or not bool(self._norms[:, max(low - 1, 0) : high + 1].any())

    def massive_positions(self) -> list[dict[str, int]]:
        """Where massive rows are: the first and last position, and how many of its rows are."""
        massive = self._norms[:, self._massive_bin() :].sum(1)
        found = []
        for bucket in massive.nonzero().flatten().tolist():
            first = last = bucket
            if bucket >= _SINGLE_POSITIONS:
                first = _SINGLE_POSITIONS * 2 ** (bucket - _SINGLE_POSITIONS)
                last = min(2 * first, self.context_size) - 1
            rows = {"massive": int(massive[bucket]), "rows": int(self._norms[bucket].sum())}
            found.append({"first": first, "last": last, **rows})
        return found

    def _massive_bin(self) -> int:
        # Rounded to a bin edge, so that the counts are exact for the reported threshold.
        return min(_NUM_BINS - 1, round(_bin_of(MASSIVE_RATIO * max(self.median_norm, 1e-6))))

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything as tensors, for a safetensors file."""
        return {
            "count": torch.tensor([self.count, self.context_size, self.sample_rows]),
            **{name.removeprefix("_"): getattr(self, name) for name in _SAVED},
            "sample_limit": torch.tensor([self._sample_limit], dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Statistics":
        """The inverse of ``to_tensors``."""
        count, context_size, sample_rows = tensors["count"].tolist()
        new = cls(len(tensors["mean"]), context_size, sample_rows)
        new.count, new._sample_limit = count, float(tensors["sample_limit"])
        for name in _SAVED:
            setattr(new, name, tensors[name.removeprefix("_")])
        return new


def _bucket_of(positions: Tensor) -> Tensor:
    octave = (positions.clamp(min=1).double() / _SINGLE_POSITIONS).log2().floor().long()
    return torch.where(positions < _SINGLE_POSITIONS, positions.long(), _SINGLE_POSITIONS + octave)


def _bin_of(norm: float) -> float:
    return (math.log2(norm) - _MIN_OCTAVE) * _BINS_PER_OCTAVE


def _bin_edge(position: float) -> float:
    return 2.0 ** (position / _BINS_PER_OCTAVE + _MIN_OCTAVE)


def _norms(rows: Tensor) -> Tensor:
    """The rows' Euclidean norms. Raises LlmWsaeError if a row holds NaN or infinity."""
    exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
    # Converted in cache: with a dtype argument vector_norm takes eight times as long.
    chunks = rows.split(_CHUNK_ROWS)
    norms = torch.cat([torch.linalg.vector_norm(chunk.to(exact), dim=1) for chunk in chunks])
    if not bool(torch.isfinite(norms).all()):  # or the square of a finite number is not
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        if bad := int((~torch.isfinite(norms)).sum()):
            raise LlmWsaeError(f"{bad} of {len(rows)} rows hold NaN or infinite activations")
    return norms.double()


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The ratio, 0 where the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator.clamp(min=1e-300), 0.0)


class SecondMoment:
    """Count, mean and Σ (x − mean)(x − mean)ᵀ of rows, float64: the covariance of all usual rows,
    for rules that whiten. Sums about a mean merge exactly (Chan, Golub & LeVeque 1983).

    The sample of ``Statistics`` is too small for this: the smallest eigenvalues of a covariance of
    8192 rows are far too small, and whitening amplifies just those.
    """

    def __init__(self, d_in: int):
        self.count = 0
        self.mean = torch.zeros(d_in, dtype=torch.float64)
        self._scatter = torch.zeros(d_in, d_in, dtype=torch.float64)

    def update(self, rows: Float[Tensor, "rows d_in"]) -> "SecondMoment":
        """Add rows. Returns self. Raises LlmWsaeError as ``Statistics.update`` does."""
        if not len(rows):  # which split would turn into one empty chunk
            return self
        if rows.shape[-1] != len(self.mean):
            raise LlmWsaeError(f"rows have {rows.shape[-1]} dimensions, not {len(self.mean)}")
        for chunk in rows.split(_PRODUCT_ROWS):
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
    """(1 − ρ)Σ + ρ·tr(Σ)/d·I for a covariance Σ that was measured on ``rows`` rows. ρ is the oracle
    approximating shrinkage of scikit-learn (Chen, Wiesel, Eldar & Hero 2010), which takes the rows
    themselves, but of nearly equal eigenvalues that of few rows in this proportion, not 1."""
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
