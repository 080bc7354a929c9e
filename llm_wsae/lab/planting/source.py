"""A store's rows with features planted into them as they are read.

Nothing is written. Which plants fire on a row, and how strongly, is drawn from the plants' seed and
the number of the row's chunk, so every reader sees the same rows: a resumed training, another
process, the measurement afterwards.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.packing import Contexts
from llm_wsae.data.shard_reader import RowReader
from llm_wsae.data.shuffling import CHUNK_ROWS, WINDOW_BYTES, shuffled_batches
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import UsageError
from llm_wsae.lab.planting.config import PlantConfig
from llm_wsae.lab.planting.plants import Plants, make_plants
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import Statistics
from llm_wsae.statistics.second_moment import SecondMoment

SPREAD = 0.25  # a firing's strength is uniform within this share of the plant's mean strength
_READ_ROWS = 8 * CHUNK_ROWS
_ROWS_OF_MEANS = 1 << 16  # read for the means of tokens
_LEAST_OF_A_TOKEN = 64  # rows that a token must have for its mean


class Firings(NamedTuple):
    """Which plants fire in a run of rows: one entry for each firing, by row."""

    row: Int[np.ndarray, " firings"]
    """Number of the row in the run, ascending."""
    plant: Int[np.ndarray, " firings"]
    """Number of the plant."""
    strength: Float[np.ndarray, " firings"]
    """How strongly it fires, in the units of the rows."""


class PlantedSource:
    """One site of a store with plants in its rows, as an ActivationSource.

    The last rows of the store are held out of the batches and of the statistics; ``heldout`` gives
    them with the truth.
    """

    def __init__(
        self,
        store: ActivationStore,
        site: Site,
        config: PlantConfig = PlantConfig(),  # noqa: B008 - frozen
        window_bytes: int = WINDOW_BYTES,
    ):
        """Raises as ``make_plants`` and ``Dictionary.load`` do, and UsageError if the store has too
        few rows to hold two chunks of them out, or the dictionary another site, width or model."""
        self.store, self.site, self.d_in = store, site, store.d_in
        self.prepends_bos = store.manifest.bos_token_id is not None
        chunks = store.num_rows // CHUNK_ROWS
        heldout = max(2, round(chunks * config.heldout_share))
        if chunks - heldout < 1:
            is_small = store.num_rows < 3 * CHUNK_ROWS
            raise UsageError(
                f"of the store's {store.num_rows:,} rows, {heldout * CHUNK_ROWS:,} would be held "
                f"out and fewer than {CHUNK_ROWS:,} trained on; "
                + ("harvest more tokens" if is_small else "lower heldout-share")
            )
        self._trained = (chunks - heldout) * CHUNK_ROWS
        self.num_rows: int | None = self._trained
        self._tokens = _of_every_row(store, lambda contexts: contexts.ids[contexts.keep])
        counts = dict(Counter(self._tokens[: self.num_rows].tolist()))
        rows_of = None if config.dictionary is None else self._dictionary(Path(config.dictionary))
        means = self._token_means() if config.natural else None
        self.plants = make_plants(store.statistics(site), counts, config, rows_of, means)
        self._window_bytes = window_bytes
        self._measured: tuple[Statistics, SecondMoment] | None = None

    def batches(
        self, batch_size: int, seed: int, start: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Float[Tensor, "rows d_in"]]:
        """Endless shuffled batches of the rows that are not held out, float32; of each, only the
        rows of ``part`` (its number, of how many)."""
        reader = self._reader(self.num_rows)
        return shuffled_batches(reader, batch_size, seed, start, self._window_bytes, part)

    def statistics(self) -> Statistics:
        """The statistics of the planted rows that are not held out: one pass, the first time."""
        return self._measure()[0]

    def second_moment(self) -> SecondMoment:
        """The covariance sums of the same rows, from the same pass, without massive rows."""
        return self._measure()[1]

    def _measure(self) -> tuple[Statistics, SecondMoment]:
        if self._measured is not None:
            return self._measured
        reader = self._reader(self.num_rows)
        place = _of_every_row(self.store, lambda contexts: np.nonzero(contexts.keep)[1])
        positions = torch.from_numpy(place)
        found = Statistics(self.d_in, self.store.context_size)
        moment = SecondMoment(self.d_in)
        threshold = self.store.statistics(self.site).massive_threshold
        total = self._trained
        with tqdm(total=total, desc="plant", unit="row", unit_scale=True, leave=False) as bar:
            for start in range(0, total, _READ_ROWS):
                stop = min(start + _READ_ROWS, total)
                rows = torch.empty(stop - start, self.d_in)
                reader.read(start, rows)
                found.update(rows, positions[start:stop])
                moment.update(rows[rows.norm(dim=1) <= threshold])
                bar.update(len(rows))
        self._measured = found, moment
        return self._measured

    def identity(self) -> dict[str, Any]:
        """JSON values that identify these rows in this order."""
        return {
            **self.store.identity(self.site),
            "window_bytes": self._window_bytes,
            "num_rows": self.num_rows,
            "planted": self.plants.identity(),
        }

    def heldout(self) -> Iterator[tuple[Float[Tensor, "rows d_in"], Firings]]:
        """The held-out rows, planted, with what fires in them; in the order of the text."""
        reader = self._reader()
        for start in range(self._trained, reader.num_rows, CHUNK_ROWS):
            rows = torch.empty(min(CHUNK_ROWS, reader.num_rows - start), self.d_in)
            yield rows, reader.read(start, rows)

    def _reader(self, stop: int | None = None) -> "PlantedReader":
        return PlantedReader(self.store.reader(self.site), self.plants, self._tokens, stop)

    def _token_means(self) -> Float[Tensor, "tokens d_in"]:
        """Of each token that is frequent among the first rows, the mean of its rows less that of
        all rows."""
        count = min(self._trained, _ROWS_OF_MEANS)
        rows = self.store.rows(self.site, 0, count).double()
        token, index, times = np.unique(
            self._tokens[:count], return_inverse=True, return_counts=True
        )
        sums = torch.zeros(len(token), self.d_in, dtype=torch.float64)
        sums.index_add_(0, torch.from_numpy(index), rows)
        frequent = torch.from_numpy(times >= _LEAST_OF_A_TOKEN)
        return sums[frequent] / torch.from_numpy(times)[frequent, None] - rows.mean(0)

    def _dictionary(self, folder: Path) -> Dictionary:
        dictionary, model = Dictionary.load(folder), self.store.manifest.model
        is_other = dictionary.info.is_of_other_weights(model)
        if is_other or (dictionary.site, dictionary.d_in) != (self.site, self.d_in):
            raise UsageError(
                f"the dictionary in {folder} is for {dictionary.d_in} dimensions of "
                f"{dictionary.site} of {'another' if is_other else 'the same'} model, so its "
                f"decoder rows cannot be planted into the {self.d_in} of {self.site} of "
                f"{model['name']}; name a dictionary of that site and model"
            )
        return dictionary


class PlantedReader:
    """Reads runs of rows and adds the plants' firings; otherwise as ``RowReader``."""

    def __init__(
        self, reader: RowReader, plants: Plants, tokens: np.ndarray, stop: int | None = None
    ):
        """``tokens``: the token id of every row; ``stop``: where the rows end, if earlier."""
        self._reader, self._plants, self._tokens = reader, plants, tokens
        self._directions = plants.directions.numpy()
        self.num_rows = reader.num_rows if stop is None else stop
        self.dtype = torch.float32  # bfloat16 would round a weak plant away on a large coordinate
        self.row_bytes = plants.directions.shape[1] * self.dtype.itemsize

    def read(self, start: int, out: Float[Tensor, "rows d_in"]) -> Firings:
        """Fill ``out`` with planted rows from ``start``, and return what was planted.

        Raises as ``RowReader.read`` does.
        """
        out.copy_(self._reader.rows(start, start + len(out)))
        found = self.firings(start, start + len(out))
        planted = torch.from_numpy(
            found.strength.astype(np.float32)[:, None] * self._directions[found.plant]
        )
        out.index_add_(0, torch.from_numpy(found.row), planted)
        return found

    def firings(self, start: int, stop: int) -> Firings:
        """What fires in the rows from ``start`` up to ``stop``."""
        pieces = []
        for chunk in range(start // CHUNK_ROWS, -(-stop // CHUNK_ROWS)):
            row, plant, strength = self._of_chunk(chunk)
            row = row + chunk * CHUNK_ROWS
            here = slice(*np.searchsorted(row, (start, stop)))
            pieces.append((row[here] - start, plant[here], strength[here]))
        return Firings(*(np.concatenate(part) for part in zip(*pieces, strict=True)))

    def _of_chunk(self, chunk: int) -> Firings:
        """What fires in a chunk of consecutive rows, all drawn at once."""
        plants = self._plants
        draw = np.random.default_rng((plants.seed, 1, chunk))
        tokens = self._tokens[chunk * CHUNK_ROWS : (chunk + 1) * CHUNK_ROWS]
        tied = plants.token.numpy() >= 0
        uniform = draw.random((CHUNK_ROWS, len(plants)), dtype=np.float32)[: len(tokens)]
        fires = uniform < plants.probability.numpy().astype(np.float32)
        fires[:, tied] &= tokens[:, None] == plants.token.numpy()[tied]
        row, plant = np.nonzero(fires)
        varied = 1 + SPREAD * draw.uniform(-1, 1, len(row))
        return Firings(row, plant, plants.strength.numpy()[plant] * varied)


def _of_every_row(store: ActivationStore, of: Callable[[Contexts], np.ndarray]) -> np.ndarray:
    shards = range(len(store.manifest.shards))
    return np.concatenate([of(store.contexts(shard)) for shard in shards])
