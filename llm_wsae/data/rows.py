"""Rows that a trainer reads: what a source of them is, how its batches are shuffled, and how rows
are read from a disk.

A sequence of rows may be far larger than memory. It is divided into chunks of 1024 consecutive
rows. In each epoch the chunks are put in a random order, as many as fit into ``window_bytes`` are
read together, and the rows of such a window are shuffled. The windows of all epochs form one
sequence of rows, and batch number b is rows b·B to (b+1)·B − 1 of it. All randomness is drawn from
(seed, epoch, window), so resuming at a batch means reading the window that it begins in.

Processes that share the rows of each batch each read a run of every chunk. Together they have the
batch of a single process.
"""

import base64
import bisect
import hashlib
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from llm_wsae.artifact.files import load_own_tensors, save_own_tensors
from llm_wsae.artifact.provenance import plain
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.machine.processes import leads
from llm_wsae.machine.threads import prefetch
from llm_wsae.model.site import Site, points_of
from llm_wsae.statistics.moments import SecondMoment, Statistics

if TYPE_CHECKING:  # it takes seconds to import, and a store needs none
    from llm_wsae.model.language_model import LanguageModel

CHUNK_ROWS = 1024
WINDOW_BYTES = 256 << 20
ROWS_PER_CHECK = 128  # rows of a shard that share a CRC-32; the last of a shard may be fewer
REPAIR = "delete it, if it is there, and run the same harvest again, which rewrites what is missing"
_SOME_SITE = Site(0, "post")  # a dictionary must name one
_READ_AS = {  # of rows of one's own
    **{name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")},
    "float64": torch.float32,
}
_RUN_BYTES = 64 << 20
_CRC = np.dtype("<u4")
_BATCHES_AHEAD = 4


@runtime_checkable
class Rows(Protocol):
    """Rows that can be read in runs: those of a store, or what is made of them as they are read."""

    num_rows: int
    row_bytes: int
    dtype: torch.dtype

    def read(self, start: int, out: Tensor) -> object:
        """Fill ``out [rows, d_in]``, contiguous and of that dtype, with rows from ``start``."""


@runtime_checkable
class ActivationSource(Protocol):
    """What a trainer reads: rows of one site, in shuffled batches that a seed determines. A class
    with these members is one; it need not inherit anything."""

    d_in: int
    site: Site  # where the rows come from; their dictionaries name it

    @property
    def num_rows(self) -> int | None:
        """Rows in one epoch, None if unknown."""

    def batches(
        self, batch_size: int, seed: int, start: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Float[Tensor, "rows d_in"] | tuple[Float[Tensor, "rows d_in"], ...]]:
        """Endless batches [batch_size, d_in] from number ``start`` on, of a transcoder's site pairs
        of them; of each, only the rows of ``part`` (its number, of how many). Batch number b of a
        seed always holds the same rows, so that a stopped training resumes with them."""

    def statistics(self) -> Statistics:
        """Statistics of the rows, or of a sample of them: always the same."""

    def second_moment(self) -> SecondMoment:
        """The covariance sums of the rows that are not massive; only rules that whiten ask."""

    def identity(self) -> dict[str, Any]:
        """JSON values that identify these rows: a training resumes only if they are the same."""


@dataclass(frozen=True)
class StoredMeasurement:
    """A measurement that is kept on disk, valid only for the same rows and settings."""

    path: Path | None  # its file; None if it is not kept
    facts: dict[str, Any]  # what identifies the rows, and the settings; JSON

    def read(self) -> dict[str, Tensor] | None:
        """The tensors by name; None, so that they are measured anew, if they are not there,
        damaged, or of something else."""
        if self.path is not None and self.path.exists():
            with suppress(LlmWsaeError):  # which would say to delete the file
                tensors, facts = load_own_tensors(self.path, "measurement")
                if facts == plain(self.facts):
                    return tensors
        return None

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Keep what was measured; if the store cannot be written to, say so."""
        if self.path is None or not leads():
            return
        try:
            save_own_tensors(self.path, tensors, plain(self.facts))
        except LlmWsaeError as error:  # a read-only store
            tqdm.write(f"the measurement is not kept: {error}", file=sys.stderr)


class SiteRows(ABC):
    """The rows of one or several sites, stored or streamed. Callers need not ask which."""

    sites: list[Site]  # points, of which a transcoder's site has two
    d_in: int
    num_blocks: int  # of the model
    num_rows: int | None  # at each site, in one epoch; None if unknown
    prepends_bos: bool  # whether contexts begin with a beginning-of-sequence token
    in_step: bool  # whether the rows of all sites come from the same forward passes
    model: "LanguageModel | None"  # what computes them; None for a store

    def source(self, site: Site) -> "SiteSource":
        """One site as a trainer reads it (an ActivationSource)."""
        return SiteSource(self, site)

    @abstractmethod
    def batches(
        self,
        sites: Sequence[Site],
        batch_size: int,
        seed: int,
        start: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Float[Tensor, "rows d_in"], ...]]:
        """Endless shuffled batches from number ``start`` on, of each site the same rows of the
        text; of a batch, only the rows of ``part`` (its number, of how many). Text, settings, batch
        size and seed decide which rows are in a batch."""

    @abstractmethod
    def statistics(self, site: Site) -> Statistics:
        """The statistics of a site's rows."""

    @abstractmethod
    def second_moment(self, site: Site) -> SecondMoment:
        """The covariance sums of the rows that are not massive: kept, or else measured."""

    @abstractmethod
    def evidence(self, site: Site, need: str, **settings: Any) -> StoredMeasurement:
        """A measurement of these rows, and where it is kept."""

    @abstractmethod
    def some_text(self, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids [contexts, positions] of about ``tokens`` tokens, and which of them give a row."""

    @abstractmethod
    def identity(self, site: Site) -> dict[str, Any]:
        """JSON values that identify a site's rows in this order."""

    @abstractmethod
    def check_model(self, identity: dict[str, Any]) -> None:
        """Raises LlmWsaeError if a model of that ``identity()`` did not compute these rows."""


class SiteSource:
    """The rows of one site, as an ActivationSource. Those of a transcoder's site are what it reads;
    ``target`` has the rows that it writes, of the same tokens."""

    def __init__(self, rows: SiteRows, site: Site):
        """Raises UsageError if the site is not among those of the ``rows``."""
        self.rows, self.site = rows, site
        self.d_in, self.num_rows, self.prepends_bos = rows.d_in, rows.num_rows, rows.prepends_bos
        self.target: SiteSource = SiteSource(rows, site.writes) if site.is_mlp else self
        self._identity = rows.identity(site.reads)
        if site.is_mlp:
            self._identity |= {"site": str(site), "target": self.target.identity()}

    def batches(
        self, batch_size: int, seed: int, start: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Float[Tensor, "rows d_in"] | tuple[Float[Tensor, "rows d_in"], ...]]:
        """Endless shuffled batches, see ``SiteRows.batches``; of both points of a transcoder."""
        found = self.rows.batches(points_of([self.site]), batch_size, seed, start, part)
        return (own if self.site.is_mlp else own[0] for own in found)

    def statistics(self) -> Statistics:
        """The statistics of these rows."""
        return self.rows.statistics(self.site.reads)

    def second_moment(self) -> SecondMoment:
        """The covariance sums of the rows that are not massive."""
        return self.rows.second_moment(self.site.reads)

    def identity(self) -> dict[str, Any]:
        """JSON values that identify these rows in this order."""
        return self._identity


class ArrayRows:
    """Rows of one's own as an ActivationSource: a tensor or an array, in memory or mapped from a
    file. They are read in runs, and have no context: each is a first position."""

    def __init__(self, rows: Any, site: Site = _SOME_SITE):
        """``rows [rows, d_in]``: a tensor, a NumPy array, or whatever else can be sliced like one;
        float32, bfloat16 or float16, or float64, which is rounded to float32. They must stay as
        they are while they are trained on. ``site``: where they come from, as their dictionaries
        will say; without one, these name the first block, which then means nothing.

        Raises UsageError for other shapes or dtypes."""
        shape = list(getattr(rows, "shape", []))
        if len(shape) != 2 or 0 in shape:
            what = f"of shape {shape}" if shape else type(rows).__name__
            raise UsageError(
                f"rows to train on are a tensor or an array [rows, d_in], not {what}; of a store "
                "pass store.source(site), and a source of your own needs every member of "
                "ActivationSource"
            )
        name = str(rows.dtype).removeprefix("torch.")
        if name not in _READ_AS:
            *names, last = _READ_AS
            raise UsageError(
                f"rows must be {', '.join(names)} or {last}, not {name}; convert them first"
            )
        self._rows = rows.detach() if isinstance(rows, Tensor) else rows
        self.site, self.dtype = site, _READ_AS[name]
        self.num_rows, self.d_in = shape
        self.row_bytes = self.d_in * self.dtype.itemsize

    def read(self, start: int, out: Tensor) -> None:
        """Fill ``out [rows, d_in]`` with rows from ``start``."""
        rows = self._rows[start : start + len(out)]
        if not isinstance(rows, Tensor):
            with np.errstate(over="ignore"):  # what is too large is found with the statistics
                rows = torch.from_numpy(np.array(rows, dtype=np.float32))
        out.copy_(rows)

    def batches(
        self, batch_size: int, seed: int, start: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Float[Tensor, "rows d_in"]]:
        """Endless shuffled batches; see ``ActivationSource``."""
        return shuffled_batches(self, batch_size, seed, start, part=part)

    def statistics(self) -> Statistics:
        """Their statistics, from one pass. Raises LlmWsaeError for a row that is not finite."""
        return self._measured[0]

    def second_moment(self) -> SecondMoment:
        """The covariance sums of the rows that are not massive, from another pass."""
        found, threshold = SecondMoment(self.d_in), self.statistics().massive_threshold
        for _, rows in self._runs("covariance"):
            found.update(rows[rows.float().norm(dim=1) <= threshold])
        return found

    def identity(self) -> dict[str, Any]:
        """JSON values that identify these rows in this order, by their content."""
        return {
            "kind": "array",
            "site": str(self.site),
            "dtype": str(self.dtype).removeprefix("torch."),
            "num_rows": self.num_rows,
            "sha256": self._measured[1],
            "window_bytes": WINDOW_BYTES,
        }

    @cached_property
    def _measured(self) -> tuple[Statistics, str]:
        """The statistics, and the digest of all rows."""
        found, digest = Statistics(self.d_in, context_size=1), hashlib.sha256()
        for start, rows in self._runs("statistics"):
            finite = rows.isfinite().all(1)
            if not bool(finite.all()):
                raise LlmWsaeError(
                    f"row {start + int(finite.int().argmin())} holds NaN or infinity, or a number "
                    f"too large for {self.dtype}; leave out such rows"
                )
            found.update(rows, torch.zeros(len(rows), dtype=torch.int64))
            digest.update(_bytes_of(rows))
        return found, digest.hexdigest()

    def _runs(self, what: str) -> Iterator[tuple[int, Tensor]]:
        """All rows, with the number of the first one of each run."""
        size = max(1, _RUN_BYTES // self.row_bytes)
        starts = range(0, self.num_rows, size)
        for start in tqdm(starts, what, delay=1.0, disable=not leads(), dynamic_ncols=True):
            rows = torch.empty(min(size, self.num_rows - start), self.d_in, dtype=self.dtype)
            self.read(start, rows)
            yield start, rows


def target_of(source: ActivationSource) -> ActivationSource:
    """The rows that dictionaries write: those that they read, or of a transcoder's source its
    ``target``, another source of the same tokens."""
    return getattr(source, "target", source)


def source_of(rows: Any) -> ActivationSource:
    """A source as it is, and rows of one's own as one. Raises UsageError for anything else."""
    return rows if isinstance(rows, ActivationSource) else ArrayRows(rows)


# --- Shuffling


class Share(NamedTuple):
    """The rows of a run that this process has."""

    size: int  # of the complete run
    places: np.ndarray  # of the rows in it, ascending
    rows: Tensor


class _Window(NamedTuple):
    """Rows that are shuffled together."""

    epoch: int
    number: int  # in its epoch
    chunks: np.ndarray  # in the order in which they were drawn
    size: int  # rows


def shuffled_batches(
    reader: Rows,
    batch_size: int,
    seed: int,
    start: int = 0,
    window_bytes: int = WINDOW_BYTES,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Float[Tensor, "rows d_in"]]:
    """Endless shuffled batches of all rows of a reader, from number ``start`` on; of each, only the
    rows of ``part`` (its number, of how many). Reading errors come with their batch. At most three
    windows are in memory."""
    assert batch_size > 0 and start >= 0 and reader.num_rows > 0
    per_window = max(1, window_bytes // (CHUNK_ROWS * reader.row_bytes))
    epoch, skip = divmod(start * batch_size, reader.num_rows)
    windows = _windows(reader.num_rows, per_window, seed, epoch)
    for first in windows:
        if skip < first.size:
            break
        skip -= first.size
    blocks = (_load(reader, window, seed, part) for window in chain([first], windows))
    return prefetch(cut(prefetch(blocks, depth=1), batch_size, skip), depth=_BATCHES_AHEAD)


def cut(
    blocks: Iterable[Share], batch_size: int, skip: int
) -> Iterator[Float[Tensor, "rows d_in"]]:
    """The rows of all blocks in batches of ``batch_size`` of the run's rows, without the first
    ``skip``, fewer than the first block has."""
    parts: list[Tensor] = []
    lack, at = batch_size, skip
    for block in blocks:
        while at < block.size:
            stop = min(block.size, at + lack)
            # Copied, so that a batch that is kept does not keep its window.
            parts.append(block.rows[slice(*np.searchsorted(block.places, (at, stop)))].clone())
            lack -= stop - at
            at = stop
            if lack == 0:
                yield parts[0] if len(parts) == 1 else torch.cat(parts)
                parts, lack = [], batch_size
        at = 0
        del block  # so that it is freed while the next one is loaded


def _windows(num_rows: int, per_window: int, seed: int, epoch: int) -> Iterator[_Window]:
    """The windows of an epoch and of all later ones."""
    num_chunks = -(-num_rows // CHUNK_ROWS)
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(num_chunks)
        # Of equal size, rather than a last one with so few chunks that they mix badly.
        for number, chunks in enumerate(np.array_split(order, -(-num_chunks // per_window))):
            size = int(np.minimum(CHUNK_ROWS, num_rows - chunks * CHUNK_ROWS).sum())
            yield _Window(epoch, number, chunks, size)
        epoch += 1


def _load(reader: Rows, window: _Window, seed: int, part: tuple[int, int]) -> Share:
    """A part of a window's rows, read in the order of the file and shuffled."""
    number, parts = part
    rows = torch.empty(window.size, reader.row_bytes // reader.dtype.itemsize, dtype=reader.dtype)
    places = np.empty(window.size, dtype=np.int64)  # of the rows that are read, in the window
    read = before = 0
    for chunk in np.sort(window.chunks).tolist():
        count = min(CHUNK_ROWS, reader.num_rows - chunk * CHUNK_ROWS)
        first, stop = count * number // parts, count * (number + 1) // parts
        end = read + stop - first
        reader.read(chunk * CHUNK_ROWS + first, rows[read:end])
        places[read:end] = np.arange(before + first, before + stop)
        read, before = end, before + count
    seeds = (seed, window.epoch, window.number)
    mine, which = shuffled(places[:read], window.size, seeds)
    return Share(window.size, mine, rows[torch.from_numpy(which)])


def shuffled(
    places: Int[np.ndarray, " held"], size: int, seeds: tuple[int, ...]
) -> tuple[Int[np.ndarray, " held"], Int[np.ndarray, " held"]]:
    """The order that the seeds give to a run of ``size`` rows, of which those from some ``places``
    are held: where they are then, ascending, and which of them stands there."""
    held = np.full(size, -1)
    held[places] = np.arange(len(places))
    held = held[np.random.default_rng(seeds).permutation(size)]
    mine = np.flatnonzero(held >= 0)
    return mine, held[mine]


# --- Rows on disk


def row_checks(rows: Tensor) -> str:
    """The CRC-32 of each ``ROWS_PER_CHECK`` contiguous rows: 32-bit numbers, little-endian, in
    base64. It finds all but one in 4·10⁹ changes at a quarter of the cost of SHA-256."""
    data, size = _bytes_of(rows), ROWS_PER_CHECK * rows.shape[1] * rows.itemsize
    found = [zlib.crc32(data[start : start + size]) for start in range(0, len(data), size)]
    return base64.b64encode(np.array(found, dtype=_CRC).tobytes()).decode()


def _bytes_of(rows: Tensor) -> memoryview:
    """The memory of contiguous rows."""
    return rows.flatten().view(torch.uint8).numpy().data


class RowFile:
    """A shard's rows of one site, one block in its file, read into the caller's memory. (The pages
    of a mapped file would count as the process's memory, and a damaged one would end it with a
    signal.)

    They are compared with their checksums when they are first read: a training never waits for a
    check of the store, and reads nothing twice.
    """

    def __init__(self, path: Path, num_rows: int, size: int, checks: str):
        """``size``: bytes of the file; ``checks``: what ``row_checks`` gave."""
        self.num_rows, self._path, self._size = num_rows, path, size
        self._checks = np.frombuffer(base64.b64decode(checks), dtype=_CRC)
        self._proved = np.zeros(len(self._checks), dtype=bool)
        if self._path.is_fifo():  # which would be waited for
            raise LlmWsaeError(f"{self._path} is no file; {REPAIR}")

    def read(self, first: int, out: Tensor) -> None:
        """Fill ``out`` with rows from ``first``."""
        self._fill(first, out)
        for number in range(first // ROWS_PER_CHECK, -(-(first + len(out)) // ROWS_PER_CHECK)):
            if self._proved[number]:
                continue
            begin = number * ROWS_PER_CHECK
            end = min(begin + ROWS_PER_CHECK, self.num_rows)
            rows = out[max(begin - first, 0) : end - first]
            if len(rows) < end - begin:  # the caller needs only a part of them
                rows = out.new_empty(end - begin, out.shape[1])
                self._fill(begin, rows)
            if zlib.crc32(_bytes_of(rows)) != self._checks[number]:
                raise LlmWsaeError(
                    f"{self._path} is damaged: rows {begin} to {end - 1} are not those that were "
                    f"written; {REPAIR}"
                )
            self._proved[number] = True

    def _fill(self, first: int, out: Tensor) -> None:
        buffer, row_bytes = _bytes_of(out), out.shape[1] * out.itemsize
        try:
            with open(self._path, "rb") as file:
                file.seek(self._size - (self.num_rows - first) * row_bytes)  # behind the header
                read = file.readinto(buffer)
        except OSError as error:
            raise LlmWsaeError(f"cannot read {self._path}: {error.strerror}") from error
        if read < len(buffer):
            raise LlmWsaeError(f"{self._path} is truncated; {REPAIR}")


class RowReader:
    """The rows of one site, as one sequence over the shards of a store, or of several."""

    def __init__(self, files: Sequence[RowFile], d_in: int, dtype: torch.dtype):
        self._files, self._d_in, self.dtype = files, d_in, dtype
        self._ends = list(accumulate(file.num_rows for file in files))
        self.num_rows = self._ends[-1] if self._ends else 0
        self.row_bytes = d_in * dtype.itemsize

    def read(self, start: int, out: Tensor) -> None:
        """Fill ``out [rows, d_in]``, contiguous and of the store's dtype, with rows from ``start``.
        Raises LlmWsaeError, naming the file, if it cannot be read or is not what was written."""
        assert out.is_contiguous() and out.dtype == self.dtype and out.shape[1] == self._d_in
        assert start >= 0 and start + len(out) <= self.num_rows
        shard, done = bisect.bisect_right(self._ends, start), 0
        while done < len(out):
            file, end = self._files[shard], self._ends[shard] - start
            if done < end:
                file.read(done + file.num_rows - end, out[done:end])
            done, shard = end, shard + 1

    def rows(self, start: int, stop: int) -> Float[Tensor, "rows d_in"]:
        """Rows ``start`` to ``stop``, in the store's dtype. Raises as ``read`` does."""
        out = torch.empty(stop - start, self._d_in, dtype=self.dtype)
        self.read(start, out)
        return out
