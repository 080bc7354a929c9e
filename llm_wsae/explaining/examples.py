"""The texts that a language model sees of each latent: some to explain it from, others to judge.

Explaining and judging use different documents, so that an explanation cannot be recognised by what
it was made from. The texts of one latent come from different contexts. One pass over the store
(``pages.collecting``) finds where latents are active, a second one reads the activations there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from llm_wsae.data.packing import NO_DOCUMENT
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.monosemanticity.detection import detection
from llm_wsae.evaluation.monosemanticity.window_embeddings import Encoder
from llm_wsae.explaining.protocol import (
    CLOSE,
    OPEN,
    WINDOW,
    ExplainConfig,
    LatentTexts,
    Text,
    harmless,
)
from llm_wsae.inspecting.vocabulary import Vocabulary
from llm_wsae.pages.collecting import activations_of, collect, context_of_every_row, windows
from llm_wsae.pages.payload import nearest

POOL = 1000
"""Random texts, shared by all latents, among which silent ones are sought."""
_NEIGHBOURS = 5  # latents nearest by decoder row
_CANDIDATES = 4  # texts of neighbours for each that is wanted: in some the latent is active too
_STRATA = 10


class NothingToExplain(LlmWsaeError):
    """No latent of a dictionary is active in enough documents."""


@dataclass(frozen=True)
class Chosen:
    """The latents of one dictionary that are asked about."""

    latents: list[LatentTexts]
    eligible: int
    """Latents with enough texts."""


@dataclass(frozen=True)
class _Rows:
    """What is known of every row of the store."""

    context: Int[np.ndarray, " rows"]
    document: Int[np.ndarray, " rows"]
    shown: Bool[np.ndarray, " rows"]
    """Whether the explainer may see its document; otherwise the judge may."""

    @classmethod
    def of(cls, store: ActivationStore, seed: int) -> "_Rows":
        """Halve the documents: chance takes one of every two of similar length."""
        shards = (store.contexts(shard) for shard in range(len(store.manifest.shards)))
        document = np.concatenate([contexts.document[contexts.keep] for contexts in shards])
        numbers, where, sizes = np.unique(document, return_inverse=True, return_counts=True)
        place = np.argsort(np.argsort(sizes, kind="stable"))
        first = np.random.default_rng(seed).integers(2, size=len(numbers) // 2 + 1)
        shown = (place + first[place // 2]) % 2 == 0
        return cls(context_of_every_row(store), document, shown[where])

    def usable(self, rows: Int[np.ndarray, " some"], show: bool) -> Int[np.ndarray, " fewer"]:
        """Those for the explainer, or for the judge; the first of each context."""
        rows = rows[rows >= 0]
        rows = rows[(self.shown[rows] == show) & (self.document[rows] != NO_DOCUMENT)]
        return rows[np.sort(np.unique(self.context[rows], return_index=True)[1])]


def choose(
    store: ActivationStore,
    dictionary: Dictionary,
    vocabulary: Vocabulary,
    config: ExplainConfig,
    encoder: Encoder | None,
) -> Chosen:
    """Choose latents and their texts. Without an ``encoder``, texts are alike that share rare
    tokens.

    Raises LlmWsaeError if the store does not fit the dictionary, NothingToExplain if no latent has
    enough texts.
    """
    top, bands = 2 * config.examples, 3 * max(config.examples, config.positives)
    found, floors = collect(store, {"": dictionary}, top, bands)
    firings, floor, rows = found[""], floors[""], _Rows.of(store, config.seed)
    texts = {}
    for latent, own in enumerate(firings.row.numpy()):
        strongest = rows.usable(own[:top], show=True)[: config.examples // 2]
        shown = rows.usable(np.concatenate([strongest, own[top:]]), show=True)[len(strongest) :]
        judged = rows.usable(own[top:], show=False)
        missing = config.examples - len(strongest)
        if len(shown) >= missing and len(judged) >= config.positives:
            texts[latent] = (
                [*strongest, *_spread(shown, missing)],
                _spread(judged, config.positives),
            )
    if not texts:
        raise NothingToExplain(
            f"no latent of {dictionary.info.name} is active in enough documents of "
            f"{store.folder}: {config.examples} texts are needed to explain one, and "
            f"{config.positives} from other documents to judge it; use a larger store, or fewer "
            "--examples and --positives"
        )
    density = firings.count.numpy()
    latents = sample_by_density(np.array(list(texts)), density, config.latents, config.seed)
    table = np.array([np.concatenate(texts[latent]) for latent in latents.tolist()])
    beside = _of_neighbours(dictionary, latents, firings.row.numpy(), table, rows, config)
    maker = _Maker(store, dictionary, vocabulary, config, encoder, floor)
    return Chosen(maker.texts(latents, table, beside, maker.pool(latents, rows)), len(texts))


def sample_by_density(
    eligible: Int[np.ndarray, " eligible"],
    density: Float[np.ndarray, " d_sae"] | Int[np.ndarray, " d_sae"],
    count: int | str,
    seed: int,
) -> Int[np.ndarray, " latents"]:
    """``count`` of the eligible latents, as many from every tenth of them by density.

    Every number has its place in one random order: dictionaries of one width get the same latents
    where these fall into the same tenth, and a larger sample contains a smaller one.
    """
    if count == "all" or int(count) >= len(eligible):
        return np.sort(eligible)
    place = np.random.default_rng(seed).permutation(len(density))
    ordered = eligible[np.argsort(density[eligible], kind="stable")]
    chosen = []
    strata = np.array_split(ordered, _STRATA)
    for stratum, quota in zip(strata, np.array_split(range(int(count)), _STRATA), strict=True):
        chosen.append(stratum[np.argsort(place[stratum])][: len(quota)])
    return np.sort(np.concatenate(chosen))


def _spread(rows: Int[np.ndarray, " n"], count: int) -> Int[np.ndarray, " count"]:
    """``count`` of the rows, at even distances."""
    return rows[((np.arange(count) + 0.5) * len(rows) / max(count, 1)).astype(np.int64)]


def _of_neighbours(
    dictionary: Dictionary,
    latents: Int[np.ndarray, " latents"],
    examples: Int[np.ndarray, "d_sae examples"],
    table: Int[np.ndarray, "latents texts"],
    rows: _Rows,
    config: ExplainConfig,
) -> Int[np.ndarray, "latents candidates"]:
    """Rows for the judge on which the latents of the nearest decoder rows are active, in contexts
    that the latent's own texts do not come from; −1 where there are no more."""
    wanted = _CANDIDATES * (config.negatives // 4)
    decoder = dictionary.W_dec
    count = min(_NEIGHBOURS + 1, dictionary.d_sae)
    near, _ = nearest(decoder[torch.from_numpy(latents)], decoder, count, same=False)
    found = np.full((len(latents), wanted), -1)
    for place, latent in enumerate(latents.tolist()):
        others = [other for other in near[place].tolist() if other != latent]
        draw = np.random.default_rng([config.seed, latent])
        theirs = rows.usable(draw.permutation(examples[others].ravel()), show=False)
        strange = theirs[~np.isin(rows.context[theirs], rows.context[table[place]])][:wanted]
        found[place, : len(strange)] = strange
    return found


@dataclass(frozen=True)
class _Pool:
    """Random texts for the judge."""

    texts: list[str]
    ids: list[list[int]]
    token: Int[Tensor, " pool"]
    """The token that each was drawn for."""
    active: Bool[np.ndarray, "pool latents"]
    """Which of the chosen latents are active in it."""


class _Maker:
    """Makes texts of rows."""

    def __init__(
        self,
        store: ActivationStore,
        dictionary: Dictionary,
        vocabulary: Vocabulary,
        config: ExplainConfig,
        encoder: Encoder | None,
        floor: Float[Tensor, " rows"],
    ):
        self._store, self._dictionary, self._vocabulary = store, dictionary, vocabulary
        self._config, self._encoder, self._floor = config, encoder, floor

    def pool(self, latents: Int[np.ndarray, " latents"], rows: _Rows) -> _Pool:
        """Random texts, one of each context."""
        draw = np.random.default_rng(self._config.seed)
        every = np.flatnonzero(~rows.shown)
        some = draw.choice(every, min(len(every), 10 * POOL), replace=False)
        chosen = rows.usable(some, show=False)[:POOL]
        numbers = torch.from_numpy(latents)
        around = self._around(numbers[:1], chosen[None])[0][0]
        cuts = [_cut(wide, draw) for wide in around]
        ids = [wide[cut].tolist() for wide, cut in zip(around, cuts, strict=True)]
        active = np.zeros((len(chosen), len(latents)), dtype=bool)
        reader = self._store.reader(self._dictionary.site)
        for number, (row, cut) in enumerate(zip(chosen.tolist(), cuts, strict=True)):
            context = int(rows.context[row])
            shard, place = self._store.place_of_context(context)
            kept = np.flatnonzero(self._store.contexts(shard).keep[place])
            start = int(np.searchsorted(rows.context, context))
            ends = kept[row - start] - (WINDOW - 1) + np.array([cut.start, cut.stop])
            first, stop = (start + np.searchsorted(kept, ends)).tolist()
            x, floor = reader.rows(first, stop), self._floor[first:stop]
            active[number] = activations_of(
                self._dictionary, x.float(), self._dictionary.W_enc[:, numbers], numbers, floor
            ).any(0)
        token = torch.from_numpy(around[:, WINDOW - 1]).long()
        return _Pool([self._text(one) for one in ids], ids, token, active)

    def texts(
        self,
        latents: Int[np.ndarray, " latents"],
        table: Int[np.ndarray, "latents texts"],
        beside: Int[np.ndarray, "latents candidates"],
        pool: _Pool,
    ) -> list[LatentTexts]:
        """The texts of every latent; the first ones of ``table`` are to be shown."""
        ids, activation = self._around(
            torch.from_numpy(latents), np.concatenate([table, beside], 1)
        )
        own, config = table.shape[1], self._config
        quarter = config.negatives // 4
        half = config.negatives - 2 * quarter
        draws = [np.random.default_rng([config.seed, 1, latent]) for latent in latents.tolist()]
        active = [
            [self._marked(*pair, draw) for pair in zip(i[:own], a[:own], strict=True)]
            for i, a, draw in zip(ids, activation, draws, strict=True)
        ]
        silent = torch.from_numpy(~pool.active).T.contiguous()
        if self._encoder is None:
            likeness, scores = _shared_tokens(ids[:, : config.examples], pool), None
        else:
            tokens = torch.from_numpy(ids[:, :own, WINDOW - 1]).long()
            likeness, scores = self._likeness(self._encoder, active, tokens, pool, silent)
        found = []
        for place, (latent, draw) in enumerate(zip(latents.tolist(), draws, strict=True)):
            numbers = draw.permutation(np.flatnonzero(silent[place].numpy()))
            rest = numbers[half:]
            hard = rest[np.argsort(-likeness[place, rest], kind="stable")][:quarter]
            near = (
                self._if_silent(*pair, draw)
                for pair in zip(ids[place, own:], activation[place, own:], strict=True)
            )
            chosen = {
                "random": [pool.texts[number] for number in numbers[:half]],
                "hard": [pool.texts[number] for number in hard],
                "neighbours": [text for text in near if text is not None][:quarter],
            }
            shown, judged = active[place][: config.examples], active[place][config.examples :]
            score = None if scores is None or scores[place].isnan() else float(scores[place])
            found.append(LatentTexts(latent, shown, judged, chosen, score))
        return found

    def _likeness(
        self,
        encoder: Encoder,
        active: Sequence[Sequence[Text]],
        tokens: Int[Tensor, "latents texts"],
        pool: _Pool,
        silent: Bool[Tensor, "latents pool"],
    ) -> tuple[Float[np.ndarray, "latents pool"], Float[Tensor, " latents"]]:
        """How alike the pool is to each latent's strongest texts in meaning, and the detection of
        the latent by that."""
        top, shown = self._config.examples // 2, self._config.examples
        flat = encoder.embed([text.plain for texts in active for text in texts])
        vectors, of_pool = flat.view(*tokens.shape, -1), encoder.embed(pool.texts)
        parts = (tokens[:, :top], tokens[:, shown:], pool.token)
        found = detection(vectors[:, :top], vectors[:, shown:], of_pool, silent, parts)
        return (normalize(vectors[:, :top].sum(1), dim=1) @ of_pool.T).numpy(), found.auroc

    def _around(
        self, latents: Int[Tensor, " latents"], table: Int[np.ndarray, "latents each"]
    ) -> tuple[Int[np.ndarray, "latents each wide"], Float[np.ndarray, "latents each wide"]]:
        """Ids and activations around rows, wide enough for every text that holds the row."""
        reach = WINDOW - 1
        rows = torch.from_numpy(table)
        seen = windows(self._store, self._dictionary, latents, rows, self._floor, reach, reach)
        shape = (*table.shape, 2 * reach + 1)
        return seen.ids.reshape(shape), seen.activation.reshape(shape)

    def _marked(
        self,
        wide: Int[np.ndarray, " wide"],
        activation: Float[np.ndarray, " wide"],
        draw: np.random.Generator,
    ) -> Text:
        cut = _cut(wide, draw)
        ids, active = wide[cut].tolist(), activation[cut] > 0
        shifts = [n for n in range(1, len(ids)) if not (np.roll(active, n) & active).any()]
        wrong = self._text(ids, np.roll(active, draw.choice(shifts))) if shifts else None
        return Text(self._text(ids), self._text(ids, active), wrong)

    def _if_silent(
        self,
        wide: Int[np.ndarray, " wide"],
        activation: Float[np.ndarray, " wide"],
        draw: np.random.Generator,
    ) -> str | None:
        """The text around a row of a neighbour; None if there is none, or the latent is active."""
        if wide[WINDOW - 1] < 0 or activation[cut := _cut(wide, draw)].any():
            return None
        return self._text(wide[cut].tolist())

    def _text(self, ids: list[int], marks: Bool[np.ndarray, " ids"] | None = None) -> str:
        marks = np.zeros(len(ids), dtype=bool) if marks is None else marks
        cuts = (np.flatnonzero(np.diff(marks)) + 1).tolist()
        pieces = map(harmless, self._vocabulary.pieces(ids, cuts))
        marked = [bool(marks[at]) for at in (0, *cuts)]
        return "".join(
            f"{OPEN}{piece}{CLOSE}" if mark else piece
            for piece, mark in zip(pieces, marked, strict=True)
        )


def _cut(wide: Int[np.ndarray, " wide"], draw: np.random.Generator) -> slice:
    """A text that holds the middle one of some tokens, at a random place in it; shorter where its
    document or its context is."""
    there = np.flatnonzero(wide >= 0)  # a run around the middle
    first, stop = int(there[0]), int(there[-1]) + 1
    if stop - first > WINDOW:
        middle = len(wide) // 2
        first = int(draw.integers(max(first, middle - WINDOW + 1), min(middle, stop - WINDOW) + 1))
        stop = first + WINDOW
    return slice(first, stop)


def _shared_tokens(
    shown: Int[np.ndarray, "latents shown wide"], pool: _Pool
) -> Float[np.ndarray, "latents pool"]:
    """How rare the tokens are, in sum, that the pool's texts share with those of each latent."""
    tokens, where = np.unique(np.concatenate(pool.ids), return_inverse=True)
    holds = np.zeros((len(pool.ids), len(tokens)), dtype=np.float32)
    holds[np.repeat(np.arange(len(pool.ids)), [len(one) for one in pool.ids]), where] = 1
    rarity = np.log(len(pool.ids) / holds.sum(0))
    return np.stack([holds @ (np.isin(tokens, own) * rarity) for own in shown])
