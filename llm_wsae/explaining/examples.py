"""The texts that a language model sees of each latent: some to explain it from, others to judge.

Explaining and judging use different documents, so that an explanation cannot be recognised by what
it was made from. The texts of one latent come from different contexts.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch.nn.functional import normalize

from llm_wsae.data.packing import NO_DOCUMENT
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.heldout import Encoder
from llm_wsae.evaluation.monosemanticity.latents import share_won, wins
from llm_wsae.explaining.protocol import (
    CLOSE,
    OPEN,
    WINDOW,
    ExplainConfig,
    LatentTexts,
    Text,
    harmless,
)
from llm_wsae.inspecting.directions import Vocabulary, nearest
from llm_wsae.inspecting.strongest import context_of_every_row
from llm_wsae.pages.collecting import activations_of, collect, place_of, windows

Numbers = Int[np.ndarray, " _"]
Rows = Int[np.ndarray, "_ _"]  # [latents, each]

POOL = 1000  # random texts, shared by all latents, among which silent ones are sought
_LATENTS_AT_ONCE = 256  # whose pairs of texts are in memory together
_NEIGHBOURS = 5  # latents nearest by decoder row
_CANDIDATES = 4  # texts of neighbours for each that is wanted: in some the latent is active too
_STRATA = 10


def choose(
    store: ActivationStore,
    dictionary: Dictionary,
    vocabulary: Vocabulary,
    config: ExplainConfig,
    encoder: Encoder,
) -> tuple[list[LatentTexts], int]:
    """Choose latents and their texts; and say how many latents have enough. Raises LlmWsaeError if
    the store does not fit the dictionary, or no latent has enough texts."""
    choice = _Choice(store, dictionary, vocabulary, config)
    rows = choice.rows_of_latents()
    if not rows:
        raise LlmWsaeError(
            f"no latent of {dictionary.info.name} is active in enough documents of "
            f"{store.folder}: {config.examples} texts are needed to explain one, and "
            f"{config.positives} from other documents to judge it; use a larger store, or fewer "
            "--examples and --positives"
        )
    density = choice.firings.count.numpy()
    latents = sample_by_density(np.array(list(rows)), density, config.latents, config.seed)
    table = np.array([rows[latent] for latent in latents.tolist()])
    return choice.texts(latents, table, encoder), len(rows)


def sample_by_density(
    eligible: Numbers, density: np.ndarray, count: int | str, seed: int
) -> Numbers:
    """``count`` of the eligible latents, as many from every tenth of them by density. Drawn
    by one random order of all numbers, so a larger sample contains a smaller one."""
    if count == "all" or int(count) >= len(eligible):
        return np.sort(eligible)
    place = np.random.default_rng(seed).permutation(len(density))
    ordered = eligible[np.argsort(density[eligible], kind="stable")]
    chosen = []
    strata = np.array_split(ordered, _STRATA)
    for stratum, quota in zip(strata, np.array_split(range(int(count)), _STRATA), strict=True):
        chosen.append(stratum[np.argsort(place[stratum])][: len(quota)])
    return np.sort(np.concatenate(chosen))


class _Choice:
    """The texts of one dictionary's latents, each cut out of the ids around a row [wide]."""

    def __init__(
        self,
        store: ActivationStore,
        dictionary: Dictionary,
        vocabulary: Vocabulary,
        config: ExplainConfig,
    ):
        self._store, self._dictionary, self._vocabulary = store, dictionary, vocabulary
        self._config, self._top = config, 2 * config.examples
        bands = 3 * max(config.examples, config.positives)
        self.firings = collect(store, {"": dictionary}, self._top, bands)[""]
        self._context = context_of_every_row(store)
        shards = (store.contexts(shard) for shard in range(len(store.manifest.shards)))
        self._document = np.concatenate([one.document[one.keep] for one in shards])
        # The explainer gets half of the documents: by chance one of every two of similar length.
        numbers, where, sizes = np.unique(self._document, return_inverse=True, return_counts=True)
        place = np.argsort(np.argsort(sizes, kind="stable"))
        first = np.random.default_rng(config.seed).integers(2, size=len(numbers) // 2 + 1)
        self._shown = ((place + first[place // 2]) % 2 == 0)[where]

    def _usable(self, rows: Numbers, show: bool) -> Numbers:
        """Rows for the explainer, or for the judge; the first of each context."""
        rows = rows[rows >= 0]
        rows = rows[(self._shown[rows] == show) & (self._document[rows] != NO_DOCUMENT)]
        return rows[np.sort(np.unique(self._context[rows], return_index=True)[1])]

    def rows_of_latents(self) -> dict[int, Numbers]:
        """The rows to show, then those to judge, of every latent that has enough."""
        config, top, found = self._config, self._top, {}
        for latent, own in enumerate(self.firings.row.numpy()):
            strongest = self._usable(own[:top], show=True)[: config.examples // 2]
            shown = self._usable(np.concatenate([strongest, own[top:]]), show=True)
            shown, judged = shown[len(strongest) :], self._usable(own[top:], show=False)
            missing = config.examples - len(strongest)
            if len(shown) >= missing and len(judged) >= config.positives:
                rows = strongest, _spread(shown, missing), _spread(judged, config.positives)
                found[latent] = np.concatenate(rows)
        return found

    def texts(self, latents: Numbers, table: Rows, encoder: Encoder) -> list[LatentTexts]:
        """The texts of every latent; ``table`` has its rows."""
        pool, silent_in = self._pool(latents)
        config, own = self._config, table.shape[1]
        beside = self._of_neighbours(latents, table)
        ids, activation = self._around(latents, np.concatenate([table, beside], 1))
        draws = [np.random.default_rng([config.seed, 1, latent]) for latent in latents.tolist()]
        active = [
            [self._marked(*pair, draw) for pair in zip(i[:own], a[:own], strict=True)]
            for i, a, draw in zip(ids, activation, draws, strict=True)
        ]
        likeness, scores = self._likeness(encoder, active, pool, silent_in)
        found = []
        for place, (latent, draw) in enumerate(zip(latents.tolist(), draws, strict=True)):
            near = zip(ids[place, own:], activation[place, own:], strict=True)
            silent = self._silent(pool, silent_in[place], likeness[place], near, draw)
            shown, judged = active[place][: config.examples], active[place][config.examples :]
            found.append(LatentTexts(latent, shown, judged, silent, scores[place]))
        return found

    def _pool(self, latents: Numbers) -> tuple[list[str], Bool[np.ndarray, "latents pool"]]:
        """Random texts for the judge, one of each context, and which latents are silent in it."""
        draw = np.random.default_rng(self._config.seed)
        every = np.flatnonzero(~self._shown)
        some = draw.choice(every, min(len(every), 10 * POOL), replace=False)
        chosen = self._usable(some, show=False)[:POOL]
        around = self._around(latents[:1], chosen[None])[0][0]
        cuts = [_cut(wide, draw) for wide in around]
        texts = [self._text(wide[cut]) for wide, cut in zip(around, cuts, strict=True)]
        silent = np.ones((len(latents), len(chosen)), dtype=bool)
        reader, numbers = self._store.reader(self._dictionary.site.reads), torch.from_numpy(latents)
        encoder = self._dictionary.W_enc[:, numbers]
        for place, (row, cut) in enumerate(zip(chosen.tolist(), cuts, strict=True)):
            *_, kept, start = place_of(self._store, self._context, int(self._context[row]))
            ends = kept[row - start] - (WINDOW - 1) + np.array([cut.start, cut.stop])
            first, stop = (start + np.searchsorted(kept, ends)).tolist()
            x, floor = reader.rows(first, stop).float(), self.firings.floor[first:stop]
            silent[:, place] = ~activations_of(self._dictionary, x, encoder, numbers, floor).any(0)
        return texts, silent

    def _of_neighbours(self, latents: Numbers, table: Rows) -> Rows:
        """Rows for the judge on which the nearest latents are active, in other contexts; or −1."""
        wanted = _CANDIDATES * (self._config.negatives // 4)
        decoder, numbers = self._dictionary.W_dec, torch.from_numpy(latents)
        near, _ = nearest(decoder[numbers], decoder, _NEIGHBOURS, numbers)
        found = np.full((len(latents), wanted), -1)
        for place, latent in enumerate(latents.tolist()):
            draw = np.random.default_rng([self._config.seed, latent])
            rows = self.firings.row[near[place]].numpy()
            theirs = self._usable(draw.permutation(rows.ravel()), show=False)
            own = self._context[table[place]]
            strange = theirs[~np.isin(self._context[theirs], own)][:wanted]
            found[place, : len(strange)] = strange
        return found

    def _around(self, latents: Numbers, table: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Ids and activations around rows, both [latents, each, wide]."""
        reach, shape = WINDOW - 1, (*table.shape, 2 * WINDOW - 1)
        given = torch.from_numpy(latents), torch.from_numpy(table), self.firings.floor
        seen = windows(self._store, self._dictionary, *given, reach, reach)
        return seen.ids.reshape(shape), seen.activation.reshape(shape)

    def _likeness(
        self,
        encoder: Encoder,
        active: Sequence[Sequence[Text]],
        pool: list[str],
        silent: np.ndarray,
    ) -> tuple[Float[np.ndarray, "latents pool"], list[float]]:
        """How alike the pool is to each latent's strongest texts, and its detection by that."""
        top, shown = self._config.examples // 2, self._config.examples
        flat = encoder.embed([text.plain for texts in active for text in texts])
        vectors, of_pool = flat.view(len(active), -1, flat.shape[1]), encoder.embed(pool)
        scores = []
        for some in torch.arange(len(active)).split(_LATENTS_AT_ONCE):
            won = wins(vectors[some, :top], vectors[some, shown:], of_pool)
            scores += share_won(won, torch.tensor(silent)[some][:, None]).tolist()
        likeness = normalize(vectors[:, :top].sum(1), dim=1) @ of_pool.T
        return likeness.numpy(), scores

    def _silent(
        self,
        pool: list[str],
        silent: Bool[np.ndarray, " pool"],
        likeness: Float[np.ndarray, " pool"],
        near: Iterable[tuple[np.ndarray, np.ndarray]],
        draw: np.random.Generator,
    ) -> dict[str, list[str]]:
        """Texts in which a latent is silent, by how they are chosen."""
        quarter = self._config.negatives // 4
        half = self._config.negatives - 2 * quarter
        numbers = draw.permutation(np.flatnonzero(silent))
        rest = numbers[half:]
        hard = rest[np.argsort(-likeness[rest], kind="stable")][:quarter]
        neighbours = []
        for wide, activation in near:
            there = wide[WINDOW - 1] >= 0
            if there and not activation[cut := _cut(wide, draw)].any():
                neighbours.append(self._text(wide[cut]))
        return {
            "random": [pool[number] for number in numbers[:half]],
            "hard": [pool[number] for number in hard],
            "neighbours": neighbours[:quarter],
        }

    def _marked(self, wide: np.ndarray, activation: np.ndarray, draw: np.random.Generator) -> Text:
        cut = _cut(wide, draw)
        ids, active = wide[cut], activation[cut] > 0
        shifts = [n for n in range(1, len(ids)) if not (np.roll(active, n) & active).any()]
        wrong = self._text(ids, np.roll(active, draw.choice(shifts))) if shifts else None
        return Text(self._text(ids), self._text(ids, active), wrong)

    def _text(self, ids: Numbers, marks: Bool[np.ndarray, " ids"] | None = None) -> str:
        marks = np.zeros(len(ids), dtype=bool) if marks is None else marks
        cuts = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist()]
        pieces = map(harmless, self._vocabulary.pieces(ids.tolist(), cuts[1:]))
        return "".join(
            f"{OPEN}{piece}{CLOSE}" if marks[at] else piece
            for piece, at in zip(pieces, cuts, strict=True)
        )


def _spread(rows: Numbers, count: int) -> Numbers:
    """``count`` of the rows, at even distances."""
    return rows[((np.arange(count) + 0.5) * len(rows) / max(count, 1)).astype(np.int64)]


def _cut(wide: Numbers, draw: np.random.Generator) -> slice:
    """A text with the middle one of some tokens at a random place, within its document."""
    there = np.flatnonzero(wide >= 0)  # a run around the middle
    first, stop = int(there[0]), int(there[-1]) + 1
    if stop - first > WINDOW:
        middle = len(wide) // 2
        first = int(draw.integers(max(first, middle - WINDOW + 1), min(middle, stop - WINDOW) + 1))
        stop = first + WINDOW
    return slice(first, stop)
