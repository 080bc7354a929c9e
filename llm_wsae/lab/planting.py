"""Features planted into the rows of a store: the ground truth that language models lack.

They come in strata of directions, because a loss hears some directions better than others:

- ``quiet dimension``, ``loud dimension``: along a dimension of least or of most variance;
- ``quiet component``, ``loud component``: along a principal component of least or most variance;
- ``random``: uniform on the sphere;
- ``antipodal``: two that point in opposite random directions (the paper's digon);
- ``triangle``: three at 120° in a random plane (its polygon);
- ``coloured ¼``, ``coloured ½``: Σ^¼g and Σ^½g of a Gaussian g, if natural ones are asked for;
- ``token mean``: from the mean of all rows to that of the rows of a token, likewise.

They are planted as rows are read, and nothing is written. Which plants fire on a row, and how
strongly, is drawn from the plants' seed and the number of the row's chunk, so every reader sees the
same rows: a resumed training, another process, the measurement afterwards.

How much of them a dictionary recovers is measured on rows that its training did not see. Every
plant gets its best latent: the one whose firing has the largest F1 with the plant's, chosen on one
half of the rows. Everything is then measured on the other half, so that the choice among thousands
of latents flatters nobody.
"""

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from llm_wsae.artifact.provenance import plain
from llm_wsae.data.packing import Contexts
from llm_wsae.data.rows import CHUNK_ROWS, WINDOW_BYTES, RowReader, SiteSource, shuffled_batches
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.sparsity import to_dense
from llm_wsae.errors import UsageError
from llm_wsae.lab.config import PlantConfig
from llm_wsae.model.site import Site
from llm_wsae.sparse.codes import Codes
from llm_wsae.statistics.moments import SecondMoment, Statistics

ON_TOKEN = 0.5
"""How often a feature that is tied to a token fires on it. A latent of the token, which knows
nothing of the feature's direction, then has an F1 of at most ⅔."""
SPREAD = 0.25
"""A firing's strength is uniform within this share of the plant's mean strength."""
RECOVERED_F1 = 0.8
MEASURES = ("recovered", "f1", "cosine", "slope", "vanished")
_READ_ROWS = 8 * CHUNK_ROWS
_ROWS_OF_MEANS = 1 << 16  # read for the means of tokens
_LEAST_OF_A_TOKEN = 64  # rows that a token must have for its mean
_Piece = tuple[Codes, Tensor]  # rows: their codes, and the strength of every plant (sparse)


@dataclass(frozen=True)
class Plants:
    """Features to add to rows: x′ = x + Σ_j a_j v_j over those that fire."""

    directions: Float[Tensor, "plants d_in"]  # unit vectors v, float32
    strength: Float[Tensor, " plants"]  # mean strength of each, in the units of the rows (float64)
    relative_strength: tuple[float, ...]
    """The same in median norms of the centred rows, as it was asked for."""
    probability: Float[Tensor, " plants"]
    """That it fires on a row; of one tied to a token, on a row of that token (float64)."""
    token: Int[Tensor, " plants"]  # id of the token that it is tied to, -1 for none
    stratum: tuple[str, ...]
    seed: int  # of the firings

    def __len__(self) -> int:
        return len(self.directions)

    def identity(self) -> dict[str, Any]:
        """JSON values that identify them."""
        digest = hashlib.sha256(self.directions.numpy().tobytes())
        for part in (self.strength, self.probability, self.token):
            digest.update(part.numpy().tobytes())
        return {"plants": len(self), "seed": self.seed, "sha256": digest.hexdigest()}


def make_plants(
    statistics: Statistics,
    token_counts: Mapping[int, int],
    config: PlantConfig = PlantConfig(),  # noqa: B008 - frozen
    token_means: Float[Tensor, "tokens d_in"] | None = None,
) -> Plants:
    """Draw plants for a site, from the statistics of its rows before planting. ``token_counts``
    says how many rows each token id has; natural ones need ``token_means``, less that of all rows.

    Raises UsageError if the site has too few dimensions or the rows too few tokens for that many
    plants, or if the plants of a row are together longer than the rows (root mean square, and
    median of the centred rows); LlmWsaeError if the rows do not vary.
    """
    draw = np.random.default_rng((config.seed, 0))
    norm = median_norm(statistics)
    per_stratum = config.per_cell * len(config.strengths)
    strata = _directions(statistics, per_stratum, draw)
    if config.natural:
        strata |= _natural_directions(statistics, per_stratum, draw, token_means)
    directions = torch.from_numpy(np.concatenate(list(strata.values())))
    relative = np.tile(np.repeat(config.strengths, config.per_cell), len(strata))
    token, probability, on_a_row = _firing(token_counts, config, len(directions), draw)
    way_out = "lower strengths, commonest or per-cell"
    check_not_drowned(directions.numpy(), relative, on_a_row, way_out)
    strength, firing, tied = map(torch.from_numpy, (relative * norm, probability, token))
    of_each = tuple(name for name in strata for _ in range(per_stratum))
    asked = tuple(relative.tolist())
    return Plants(directions.float(), strength, asked, firing, tied, of_each, config.seed)


def median_norm(statistics: Statistics) -> float:
    """Of the centred rows that are not massive. Raises LlmWsaeError if the rows do not vary."""
    statistics.check_varying()
    usual = statistics.usual_sample.double()
    return float((usual - usual.mean(0)).norm(dim=1).median())


def check_not_drowned(
    directions: np.ndarray, strengths: np.ndarray, probability: np.ndarray, way_out: str
) -> None:
    """Raises UsageError if plants of these strengths, in median norms of the rows, would drown
    them: if those of a row are together longer than it (root mean square)."""
    # of ‖Σ_j b_j a_j v_j‖, where b_j is 1 that often, on its own, and a_j fixed
    mean = (probability * strengths) @ directions
    spread = np.sum(probability * (1 - probability) * strengths**2)
    if (together := float(np.sqrt(mean @ mean + spread))) > 1:
        raise UsageError(
            f"the plants of a row are together {together:.1f} times as long as the rows, and would "
            f"drown the stream; {way_out}"
        )


def _firing(
    token_counts: Mapping[int, int], config: PlantConfig, count: int, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each plant its token, its probability there, and that on any row."""
    low, high = np.log([config.rarest, config.commonest])
    probability = np.exp(draw.uniform(low, high, count))
    on_a_row, token = probability.copy(), np.full(count, -1)
    of_cell = np.arange(config.per_cell) < round(config.token_share * config.per_cell)
    tied = np.flatnonzero(np.tile(of_cell, count // config.per_cell))
    ids = np.array(sorted(token_counts), dtype=np.int64)
    if len(tied) > len(ids):
        raise UsageError(
            f"the rows have {len(ids):,} different tokens, too few to tie each of {len(tied):,} "
            "features to one of its own; lower token-share or per-cell"
        )
    share = np.array([token_counts[i] for i in ids.tolist()]) / max(1, sum(token_counts.values()))
    for plant in tied.tolist():
        nearest = int(np.abs(np.log(share * ON_TOKEN / probability[plant])).argmin())
        token[plant], probability[plant] = ids[nearest], ON_TOKEN
        on_a_row[plant] = ON_TOKEN * share[nearest]
        share[nearest] = np.inf  # another plant takes another token
    return token, probability, on_a_row


def _directions(
    statistics: Statistics, count: int, draw: np.random.Generator
) -> dict[str, np.ndarray]:
    """Stratum → unit vectors [count, d_in], in an order that says nothing of their variance."""
    d_in = statistics.d_in
    varying = torch.where(statistics.robust_variance > 0)[0]
    by_variance = varying[statistics.robust_variance[varying].argsort()].numpy()
    if len(by_variance) < 2 * count:
        raise UsageError(
            f"the site has {len(by_variance)} dimensions that vary, too few to plant along {count} "
            f"of least and {count} of most variance; lower per-cell"
        )
    axes = np.eye(d_in)
    vectors = torch.linalg.eigh(statistics.robust_covariance).eigenvectors.T.numpy()
    components = vectors[d_in - len(by_variance) :]  # the rest belong to constant dimensions

    def some(vectors: np.ndarray) -> np.ndarray:
        signs = draw.choice([-1.0, 1.0], size=(count, 1))
        return vectors[draw.permutation(count)] * signs

    def on_sphere(count: int) -> np.ndarray:
        return _unit(draw.standard_normal((count, d_in)))

    planes = on_sphere(2 * -(-count // 3)).reshape(-1, 2, d_in)
    pairs = on_sphere(-(-count // 2))
    return {
        "quiet dimension": some(axes[by_variance[:count]]),
        "loud dimension": some(axes[by_variance[-count:]]),
        "quiet component": some(components[:count]),
        "loud component": some(components[-count:]),
        "random": on_sphere(count),
        "antipodal": np.stack([pairs, -pairs], 1).reshape(-1, d_in)[:count],
        "triangle": np.concatenate([_triangle(plane) for plane in planes])[:count],
    }


def _natural_directions(
    statistics: Statistics, count: int, draw: np.random.Generator, token_means: Tensor | None
) -> dict[str, np.ndarray]:
    """Those that the stream itself prefers, the louder the more."""
    if token_means is None or len(token_means) < count:
        raise UsageError(
            f"the rows have too few tokens of which there are many to plant along {count} of their "
            "means; harvest more tokens or lower per-cell"
        )
    values, vectors = np.linalg.eigh(statistics.robust_covariance.numpy())

    def coloured(power: float) -> np.ndarray:
        gaussian = draw.standard_normal((count, statistics.d_in))
        return _unit(gaussian @ (vectors * values.clip(0) ** power) @ vectors.T)

    chosen = draw.permutation(len(token_means))[:count]
    return {
        "coloured ¼": coloured(0.25),
        "coloured ½": coloured(0.5),
        "token mean": _unit(token_means.double().numpy()[chosen]),
    }


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _triangle(plane: np.ndarray) -> np.ndarray:
    """Three unit vectors at 120° in the plane of two."""
    first, second = np.linalg.qr(plane.T)[0].T
    angles = np.arange(3) * 2 * np.pi / 3
    return np.cos(angles)[:, None] * first + np.sin(angles)[:, None] * second


class Firings(NamedTuple):
    """Which plants fire in a run of rows: one entry for each firing, by row."""

    row: Int[np.ndarray, " firings"]  # its number in the run, ascending
    plant: Int[np.ndarray, " firings"]
    strength: Float[np.ndarray, " firings"]  # in the units of the rows


class KnownSource(SiteSource):
    """Rows of a site in which features are planted. ``plants`` are those that are looked for."""

    plants: Plants

    @abstractmethod
    def heldout(self) -> Iterator[tuple[Float[Tensor, "rows d_in"], Firings]]:
        """Rows that are not trained on, with what fires in them; in the order of the text."""


class PlantedSource(KnownSource):
    """One site of a store with plants in its rows, as an ActivationSource. The last rows are held
    out of the batches and of the statistics; ``heldout`` gives them with the truth."""

    def __init__(
        self,
        store: ActivationStore,
        site: Site,
        config: PlantConfig = PlantConfig(),  # noqa: B008 - frozen
    ):
        """Raises as ``make_plants`` does, and UsageError if the store has too few rows to hold two
        chunks of them out."""
        super().__init__(store, site)
        self._store = store
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
        self.num_rows = self._trained
        self._tokens = _of_every_row(store, lambda contexts: contexts.ids[contexts.keep])
        counts = dict(Counter(self._tokens[: self.num_rows].tolist()))
        means = self._token_means() if config.natural else None
        self.plants = make_plants(store.statistics(site), counts, config, means)

    def batches(
        self, batch_size: int, seed: int, start: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Float[Tensor, "rows d_in"]]:
        """Endless shuffled batches of the rows that are not held out, float32; of each, only the
        rows of ``part`` (its number, of how many)."""
        reader = self.reader(self.num_rows)
        return shuffled_batches(reader, batch_size, seed, start, WINDOW_BYTES, part)

    def statistics(self) -> Statistics:
        """The statistics of the planted rows that are not held out: one pass, the first time."""
        return self._measured[0]

    def second_moment(self) -> SecondMoment:
        """The covariance sums of the same rows, from the same pass, without massive rows."""
        return self._measured[1]

    @cached_property
    def _measured(self) -> tuple[Statistics, SecondMoment]:
        reader, total = self.reader(self.num_rows), self._trained
        place = _of_every_row(self._store, lambda contexts: np.nonzero(contexts.keep)[1])
        positions = torch.from_numpy(place)
        found = Statistics(self.d_in, self._store.context_size)
        moment = SecondMoment(self.d_in)
        threshold = self._store.statistics(self.site).massive_threshold
        with tqdm(total=total, desc="plant", unit="row", unit_scale=True, leave=False) as bar:
            for start in range(0, total, _READ_ROWS):
                rows = torch.empty(min(_READ_ROWS, total - start), self.d_in)
                reader.read(start, rows)
                found.update(rows, positions[start : start + len(rows)])
                moment.update(rows[rows.norm(dim=1) <= threshold])
                bar.update(len(rows))
        return found, moment

    def identity(self) -> dict[str, Any]:
        """JSON values that identify these rows in this order."""
        own = {"num_rows": self.num_rows, "planted": self.plants.identity()}
        return super().identity() | own

    def heldout(self) -> Iterator[tuple[Float[Tensor, "rows d_in"], Firings]]:
        """The held-out rows, planted, with what fires in them; in the order of the text."""
        reader = self.reader()
        for start in range(self._trained, reader.num_rows, CHUNK_ROWS):
            rows = torch.empty(min(CHUNK_ROWS, reader.num_rows - start), self.d_in)
            yield rows, reader.read(start, rows)

    def reader(self, stop: int | None = None) -> "PlantedReader":
        """Reads planted rows, of all of the store or of the first ones."""
        return PlantedReader(self._store.reader(self.site), self.plants, self._tokens, stop)

    def _token_means(self) -> Float[Tensor, "tokens d_in"]:
        """Of each token that is frequent among the first rows: its mean less that of all rows."""
        count = min(self._trained, _ROWS_OF_MEANS)
        rows = self._store.rows(self.site, 0, count).double()
        token, index, times = np.unique(
            self._tokens[:count], return_inverse=True, return_counts=True
        )
        sums = torch.zeros(len(token), self.d_in, dtype=torch.float64)
        sums.index_add_(0, torch.from_numpy(index), rows)
        frequent = torch.from_numpy(times >= _LEAST_OF_A_TOKEN)
        return sums[frequent] / torch.from_numpy(times)[frequent, None] - rows.mean(0)


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
        """Fill ``out`` with planted rows from ``start``, and return what was planted. Raises as
        ``RowReader.read`` does."""
        stop = start + len(out)
        out.copy_(self._reader.rows(start, stop))
        pieces = []
        for chunk in range(start // CHUNK_ROWS, -(-stop // CHUNK_ROWS)):
            row, plant, strength = self._of_chunk(chunk)
            row = row + chunk * CHUNK_ROWS
            here = slice(*np.searchsorted(row, (start, stop)))
            pieces.append((row[here] - start, plant[here], strength[here]))
        found = Firings(*(np.concatenate(part) for part in zip(*pieces, strict=True)))
        planted = torch.from_numpy(
            found.strength.astype(np.float32)[:, None] * self._directions[found.plant]
        )
        out.index_add_(0, torch.from_numpy(found.row), planted)
        return found

    def _of_chunk(self, chunk: int) -> Firings:
        """What fires in a chunk of consecutive rows, all drawn at once."""
        plants = self._plants
        draw = np.random.default_rng((plants.seed, 1, chunk))
        tokens = self._tokens[chunk * CHUNK_ROWS : (chunk + 1) * CHUNK_ROWS]
        of_plant = plants.token.numpy()
        tied = of_plant >= 0
        uniform = draw.random((CHUNK_ROWS, len(plants)), dtype=np.float32)[: len(tokens)]
        fires = uniform < plants.probability.numpy().astype(np.float32)
        fires[:, tied] &= tokens[:, None] == of_plant[tied]
        row, plant = np.nonzero(fires)
        varied = 1 + SPREAD * draw.uniform(-1, 1, len(row))
        return Firings(row, plant, plants.strength.numpy()[plant] * varied)


def _of_every_row(store: ActivationStore, of: Callable[[Contexts], np.ndarray]) -> np.ndarray:
    shards = range(len(store.manifest.shards))
    return np.concatenate([of(store.contexts(shard)) for shard in shards])


@dataclass(frozen=True)
class PlantRecovery:
    """One dictionary compared with the plants; all tensors [plants], float64 unless said
    otherwise."""

    plants: Plants
    latent: Int[Tensor, " plants"]  # the number of each plant's best (int64)
    f1: Float[Tensor, " plants"]
    """2·both / (plant fires + latent fires), over rows; NaN for a plant that does not fire."""
    cosine: Float[Tensor, " plants"]
    """Between the plant's direction and the decoder row of its latent."""
    slope: Float[Tensor, " plants"]
    """Answer over strength where both fire: Σ z⟨w, v⟩a / Σ a², without a fitted scale. Below 1 the
    feature is shrunk. NaN if they never fire together."""
    vanished: Float[Tensor, " plants"]  # share of the plant's firings on which its latent is silent
    l_gt: float
    """min over one scale c of Σ_j E(x_j − c·z_j)² / Σ_j E x_j²: what is missing of the plants when
    each is read from its latent."""
    dead: float  # share of the latents that fire on none of the held-out rows

    @property
    def recovered(self) -> Float[Tensor, " plants"]:
        """1 where F1 reaches 0.8, else 0; NaN for a plant that does not fire."""
        return torch.where(self.f1.isnan(), self.f1, (self.f1 >= RECOVERED_F1).double())

    def means(self) -> dict[str, float]:
        """Mean of every measure over the plants that have it."""
        columns = {name: getattr(self, name) for name in MEASURES}
        return {name: float(own[~own.isnan()].mean()) for name, own in columns.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: means, and every plant."""
        plants = self.plants
        known = {"stratum": plants.stratum, "strength": plants.relative_strength}
        measured = {name: getattr(self, name).tolist() for name in MEASURES}
        every = plain({**known, "token": plants.token.tolist(), **measured})
        return {**self.means(), "l_gt": self.l_gt, "dead": self.dead, "plants": every}


def measure_recovery(dictionary: Dictionary, source: KnownSource) -> PlantRecovery:
    """Compare a dictionary with a source's plants on its held-out rows, massive ones ignored.
    Raises UsageError if the dictionary is of another site or width."""
    if (dictionary.site, dictionary.d_in) != (source.site, source.d_in):
        raise UsageError(
            f"the dictionary is for {dictionary.d_in} dimensions of {dictionary.site}, but the "
            f"plants are in {source.d_in} of {source.site}"
        )
    plants, threshold = source.plants, source.statistics().massive_threshold
    halves: tuple[list[_Piece], list[_Piece]] = ([], [])
    for number, (rows, firings) in enumerate(source.heldout()):
        kept = rows.norm(dim=1) <= threshold
        codes = dictionary.encode_sparse(rows[kept].to(dictionary.W_enc.device))
        truth = torch.zeros(len(rows), len(plants))
        truth[firings.row, firings.plant] = torch.from_numpy(firings.strength).float()
        piece = Codes(codes.indices.cpu(), codes.values.cpu()), truth[kept].to_sparse()
        halves[number % 2].append(piece)
    (together, seen_fires, active), (_, _, active_later) = (
        _counts(half, len(plants), dictionary.d_sae) for half in halves
    )
    either = seen_fires[:, None] + active
    best = (2 * together / either.clamp(min=1)).argmax(1)  # of largest F1
    decoder = dictionary.W_dec.detach().cpu().double()[best]
    length = decoder.norm(dim=1)
    along = (decoder * plants.directions.double()).sum(1)
    seen = seen_fires.bool()
    answered = seen & (together.sum(1) > 0)  # else no latent is the best
    sums = _sums(halves[1], best, seen, answered, dictionary.d_sae)
    fires, both = sums["fires"], sums["both"]
    none = torch.full_like(fires, torch.nan)
    product, power = (sums["answer"] * length).sum(), (sums["code"] * length.square()).sum()
    explained = product.square() / power.clamp(min=1e-300) / sums["truth"].sum().clamp(min=1e-300)
    return PlantRecovery(
        plants=plants,
        latent=best,
        f1=torch.where(fires > 0, 2 * both / (fires + sums["active"]), none),
        cosine=torch.where(answered, along / length.clamp(min=1e-300), none),
        slope=torch.where(both > 0, sums["answer"] * along / sums["together"], none),
        vanished=torch.where(fires > 0, 1 - both / fires, none),
        l_gt=float(1 - explained),
        dead=float((active + active_later == 0).double().mean()),
    )


def _counts(pieces: list[_Piece], plants: int, latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """On how many rows plants and latents fire: together [plants, latents], and each."""
    together, fires = torch.zeros(plants, latents), torch.zeros(plants)
    active = torch.zeros(latents)
    for codes, strength in pieces:
        truth = (strength.to_dense() > 0).float()
        answer = (to_dense(codes, latents) > 0).float()
        together += torch.sparse.mm(truth.T.to_sparse(), answer)
        fires += truth.sum(0)
        active += answer.sum(0)
    return together, fires, active


def _sums(
    pieces: list[_Piece], best: Tensor, seen: Tensor, answered: Tensor, latents: int
) -> dict[str, Tensor]:
    """Over rows, for every plant and its latent; plants that were not ``seen`` where latents were
    chosen do not fire, and latents of those that were not ``answered`` are silent."""
    found: dict[str, Tensor] = {}
    for codes, strength in pieces:
        truth = strength.to_dense().double() * seen
        answer = to_dense(codes, latents)[:, best].double() * answered
        both = (truth > 0) & (answer > 0)
        parts = {
            "fires": (truth > 0).double(),
            "active": (answer > 0).double(),
            "both": both.double(),
            "answer": answer * truth,
            "together": truth.square() * both,
            "truth": truth.square(),
            "code": answer.square(),
        }
        for name, part in parts.items():
            found[name] = found.get(name, 0) + part.sum(0)
    return found
