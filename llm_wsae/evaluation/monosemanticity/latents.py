"""Where every latent of a dictionary fires, and the scores that follow from it.

Only one firing per context counts, because neighbouring firings share their text. Massive rows are
left out: latents that fire on them would list nothing else among their top contexts. A latent is
eligible when it fires in enough contexts for all of its top contexts and all of its sampled ones.

*Detection* asks, without a judge, whether a latent's contexts can be distinguished from others by
their meaning. The centroid of its top contexts, as sentence embeddings, serves as its
"explanation". It is tested on contexts sampled over all quantiles of the latent's activation,
against random windows where the latent is silent: the score is the area under the ROC curve of the
similarity to the centroid, 0.5 for a latent whose contexts have nothing in common. Subjects and
genres could pass for meaning, so documents that hold a top context are left out on both sides, and
a context is compared only with those of its own genre. It is also measured without windows whose
centre is a token of the top contexts, by which a latent for one word is detected; and on
resamplings of the documents (bootstrap, Efron 1979), the same for all latents and dictionaries.

*Coherence* is the mean cosine of all pairs of a latent's contexts, less that of random windows of
different contexts, as the paper measures its vision features (section 5 of arXiv 2506.15963).
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.evaluation.config import FEWEST_NEGATIVE, FEWEST_POSITIVE, MonosemanticConfig
from llm_wsae.evaluation.heldout import (
    OUTSIDE,
    ActivationCache,
    HeldoutText,
    RowBatch,
    WindowEmbeddings,
)
from llm_wsae.evaluation.monosemanticity.concepts import NO_UNIT, Units
from llm_wsae.inspecting.strongest import Strongest, Table
from llm_wsae.model.site import Site

NO_ROW = -1
RESAMPLED = "detection_resampled"
"""Detection of every latent on resamplings of the documents, beside its scores."""
_RESAMPLINGS = 100
_LATENTS_AT_ONCE = 256  # whose embeddings, and pairs of windows, are in memory together


class Firings:
    """What one dictionary's latents do on a text: recorded batch by batch on its device, and read
    on the CPU when it is finished.

    Of each latent and context the best firing is kept, so memory is latents × examples. A latent's
    sample is uniform over its firings, one per context: random numbers are drawn once per row, and
    the first ones count. So it does not depend on the cut into batches, and few windows, shared by
    many latents and dictionaries, have to be embedded.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        threshold: float,
        text: HeldoutText,
        windows: Int[Tensor, "windows width"],
        examples: tuple[int, int],
        seed: int,
        kinds: Sequence[Units] = (),
    ):
        """``threshold`` is the norm above which a row is massive; ``windows`` are the positions of
        the random windows; ``examples`` the numbers of top contexts and of sampled ones; ``kinds``
        the units to make tables of."""
        self.dictionary, self._threshold, self._kinds = dictionary, threshold, kinds
        d_sae, device = dictionary.d_sae, dictionary.W_enc.device
        self._text, self._windows = text, windows
        self._window_rows = text.row_at[windows].where(windows != OUTSIDE, OUTSIDE)
        order = torch.randperm(text.num_rows, generator=torch.Generator().manual_seed(seed))
        self._drawn = -order.float().to(device)  # the higher, the earlier in the draw
        self.num_rows = 0  # less massive ones
        self.counts = torch.zeros(d_sae, dtype=torch.int64, device=device)  # rows on which it fires
        self.contexts = torch.zeros_like(self.counts)  # in which it fires
        self._context = text.context.to(device)
        self._kept = [Strongest(d_sae, count, self._context) for count in examples]
        self.fired = torch.zeros(len(windows), d_sae, dtype=torch.bool, device=device)
        """Whether each latent fires anywhere in each of the random windows."""
        self._entries: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in kinds]

    def add(self, batch: RowBatch) -> None:
        """Encode a batch's rows and keep what is needed of the codes."""
        rows = batch.activations[self.dictionary.site.reads]
        indices, values = self.dictionary.encode_sparse(rows)
        usable = rows.float().norm(dim=1) <= self._threshold
        active = (values > 0) & usable[:, None]
        local, slot = active.nonzero(as_tuple=True)
        latent, value = indices[local, slot], values[local, slot].float()
        self.num_rows += int(usable.sum())
        self.counts += torch.bincount(latent, minlength=self.dictionary.d_sae)
        row, width = local + batch.rows.start, batch.contexts.stop - batch.contexts.start
        fired = latent.new_zeros(self.dictionary.d_sae, width, dtype=torch.bool)
        fired[latent, self._context[row] - batch.contexts.start] = True
        self.contexts += fired.sum(1)
        for kept, score in zip(self._kept, (value, self._drawn[row]), strict=True):
            kept.add(latent, score, value, row)
        self._mark_windows(batch, indices, active)
        self._add_to_tables(batch, latent.cpu(), value.cpu(), local.cpu())

    def _mark_windows(self, batch: RowBatch, indices: Tensor, active: Tensor) -> None:
        rows = self._window_rows
        here = (rows >= batch.rows.start) & (rows < batch.rows.stop)
        window = here.nonzero()[:, 0].to(active.device)
        local = (rows[here] - batch.rows.start).to(active.device)
        event, slot = active[local].nonzero(as_tuple=True)
        self.fired[window[event], indices[local[event], slot]] = True

    def _add_to_tables(self, batch: RowBatch, latent: Tensor, value: Tensor, row: Tensor) -> None:
        for units, entries in zip(self._kinds, self._entries, strict=True):
            unit = units.of_row[batch.rows][row]
            here = unit != NO_UNIT
            entries.append((latent[here], unit[here], value[here]))

    def finished(self) -> "Firings":
        """Itself, on the CPU."""
        self.counts, self.fired = self.counts.cpu(), self.fired.cpu()
        self.contexts, tables = self.contexts.cpu(), (kept.table() for kept in self._kept)
        self.top, self.sample = (Table(rows.cpu(), values.cpu()) for rows, values in tables)
        return self

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of rows on which each latent fires."""
        return self.counts.double() / max(self.num_rows, 1)

    def tables(self) -> list[Float[Tensor, "d_sae units"]]:
        """The latents' activations for each kind of units: sparse where every unit is one row."""
        found = []
        for units, entries in zip(self._kinds, self._entries, strict=True):
            latent, unit, value = (torch.cat(parts) for parts in zip(*entries, strict=True))
            at, shape = torch.stack([latent, unit]), (self.dictionary.d_sae, len(units.size))
            table = torch.sparse_coo_tensor(at, value, shape, check_invariants=False).coalesce()
            found.append(table if units.single else (table.T.to_dense() / units.size[:, None]).T)
        return found

    def quantile_sample(self, count: int) -> Int[Tensor, "d_sae count"]:
        """Rows of ``count`` of the sampled firings outside the top contexts, evenly spread over the
        ranks of their values; all of them if a latent has fewer, and then -1."""
        rows = self.sample.rows
        top, drawn = self._contexts_of(self.top.rows), self._contexts_of(rows)
        usable = (rows != NO_ROW) & ~_among(drawn, top)
        ranked = self.sample.values.where(usable, -1.0).argsort(dim=1, descending=True, stable=True)
        available = usable.sum(1, keepdim=True)
        number = torch.arange(count)
        spread = ((2 * number + 1) * available).div(2 * count, rounding_mode="floor")
        rank = spread.where(available >= count, number).clamp(max=rows.shape[1] - 1)
        return rows.gather(1, ranked.gather(1, rank)).where(number < available, NO_ROW)

    def silent_windows(self, latents: Int[Tensor, " latents"]) -> Bool[Tensor, "latents windows"]:
        """The random windows, outside a latent's top contexts, where it never fires."""
        context = self._windows.amax(1) // self._text.ids.shape[1]
        top = self._contexts_of(self.top.rows[latents])
        return ~self.fired[:, latents].T & ~_among(context, top)

    def _contexts_of(self, rows: Tensor) -> Tensor:
        return self._text.context[rows].where(rows != NO_ROW, NO_ROW)


def read_units(
    activations: ActivationCache, thresholds: Mapping[Site, float], kinds: Sequence[Units]
) -> dict[Site, list[Float[Tensor, "_ d_in"]]]:
    """For each site, the mean activations of each kind of units, float32 on the CPU. Rows whose
    norm exceeds the site's threshold count as zeros."""
    found: dict[Site, list[Tensor]] = {}
    for batch in activations.rows(list(thresholds)):
        for site, rows in batch.activations.items():
            if site not in found:
                found[site] = [torch.zeros(len(units.size), rows.shape[1]) for units in kinds]
            usable = (rows.float().norm(dim=1) <= thresholds[site]).cpu()
            for units, x in zip(kinds, found[site], strict=True):
                unit = units.of_row[batch.rows]
                here = (unit != NO_UNIT) & usable
                x.index_add_(0, unit[here], rows[here.to(rows.device)].float().cpu())
    for of_site in found.values():
        for units, x in zip(kinds, of_site, strict=True):
            x /= units.size[:, None]
    return found


class LatentScorer:
    """Scores latents on one text, with random windows that all dictionaries share."""

    def __init__(
        self,
        text: HeldoutText,
        token: Int[Tensor, " rows"],
        embeddings: WindowEmbeddings,
        config: MonosemanticConfig,
    ):
        """``token`` is a number for each row's token, ignoring space and case."""
        generator = torch.Generator().manual_seed(config.seed)
        random = torch.randperm(text.num_rows, generator=generator)[: config.silent].sort().values
        embeddings.prepare(random)
        self.text, self.random, self.windows = text, random, embeddings.cells(random)
        self._token, self._embeddings, self._config = token, embeddings, config
        self._of_random = embeddings.of(random)
        self._strangers = coherence_of_strangers(self._of_random, text.context[random])
        self._genre, self._drawn = _documents(text, config.seed)

    def recorder(
        self, dictionary: Dictionary, threshold: float, kinds: Sequence[Units] = ()
    ) -> Firings:
        """For the firings that ``scores`` needs, once the text was passed to it."""
        top, sample, seed = self._config.top, self._config.sample, self._config.seed
        # More than will be used: some are in top contexts, and the rest is chosen by quantile.
        examples = top, top + 4 * sample
        return Firings(dictionary, threshold, self.text, self.windows, examples, seed, kinds)

    def chance(self) -> float:
        """Purity of the tokens if latents fired at random: of as many random windows as a latent
        has top contexts, one from each stretch of the text; NaN if there are fewer windows."""
        top, count = self._config.top, len(self.random) // self._config.top
        rows = self.random[: count * top].view(top, count).T
        return float(purity(rows, self._token).mean())

    def scores(self, firings: Firings) -> dict[str, Float[Tensor, " d_sae"]]:
        """Every score of all latents, and ``RESAMPLED`` [d_sae, resamplings]. NaN where a latent
        has none: those that are not eligible have no purity."""
        enough = self._config.top + self._config.sample
        latents = (firings.contexts >= enough).nonzero()[:, 0]
        rows = firings.top.rows, firings.quantile_sample(self._config.sample)
        self._embeddings.prepare(torch.cat([one[latents] for one in rows], 1))
        found: dict[str, Tensor] = {}
        for some in latents.split(_LATENTS_AT_ONCE):
            silent = firings.silent_windows(some)
            for name, values in self._scores_of(rows[0][some], rows[1][some], silent).items():
                shape = (len(firings.counts), *values.shape[1:])
                nothing = torch.full(shape, torch.nan, dtype=torch.float64)
                found.setdefault(name, nothing)[some] = values.double()
        found["coherence"] -= self._strangers
        return found

    def _scores_of(self, top: Tensor, sample: Tensor, silent: Tensor) -> dict[str, Tensor]:
        token, random = self._token, self.random
        documents = [self.text.document_of[rows] for rows in (top, sample, random)]
        embedded = self._embeddings.of(top)
        won = wins(embedded, self._embeddings.of(sample), self._of_random)
        pairs = fair_pairs(silent, documents, self._genre)
        others = pairs & strange_pairs(token[top], token[sample], token[random])
        detected, drawn = share_won(won, pairs), _resampled(won, pairs, documents, self._drawn)
        return {
            "purity": purity(top, token),
            "coherence": coherence(embedded),
            "detection": detected,
            "detection_without_tokens": share_won(won, others),
            RESAMPLED: drawn.where(~detected.isnan()[:, None], torch.nan),
        }


def _documents(
    text: HeldoutText, seed: int
) -> tuple[Int[Tensor, " documents"], Float[Tensor, "resamplings documents"]]:
    """The genre of every document, and how often each resampling holds it. Documents of one genre
    have the same labels, whatever their values. The last entry, -1, is of rows in no document: a
    genre of their own, once in each resampling."""
    count = int(text.document_of.max()) + 1
    kinds: dict[tuple[str, ...], int] = {}
    genre = torch.zeros(count + 1, dtype=torch.long)
    genre[-1] = -1
    for number, header in text.headers.items():
        if number < count:
            genre[number] = kinds.setdefault(tuple(sorted(header["labels"])), len(kinds))
    present = text.document_of.unique()
    present = present[present >= 0]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(present), (_RESAMPLINGS, len(present)), generator=generator)
    drawn = torch.zeros(_RESAMPLINGS, count + 1)
    drawn[:, -1] = 1
    drawn.scatter_add_(1, present[chosen], torch.ones(chosen.shape))
    return genre, drawn


def purity(
    rows: Int[Tensor, "latents examples"], token: Int[Tensor, " rows"]
) -> Float[Tensor, " latents"]:
    """Share of the most frequent ``token`` at each latent's rows. A row of -1 is no example; NaN
    for a latent without examples."""
    there = rows != NO_ROW
    found = token[rows.clamp(min=0)]
    same = (found[:, :, None] == found[:, None, :]) & there[:, None, :]  # [latents, each, others]
    number = there.sum(1).double()
    share = same.sum(2).double() / number[:, None]
    return torch.where(there, share, 0.0).amax(1).where(number > 0, torch.nan)


def coherence(embeddings: Float[Tensor, "latents examples width"]) -> Float[Tensor, " latents"]:
    """Mean cosine of all pairs of a latent's examples, given as unit vectors."""
    n = embeddings.shape[1]  # the squared norm of their sum is n + 2 Σ of the pairs' cosines
    return (embeddings.sum(1).square().sum(1) - n) / (n * (n - 1))


def coherence_of_strangers(
    embeddings: Float[Tensor, "windows width"], context: Int[Tensor, " windows"]
) -> float:
    """Mean cosine of all pairs of windows of different contexts; NaN if there are none."""
    numbers, group = context.unique(return_inverse=True)
    sums = torch.zeros(len(numbers), embeddings.shape[1], dtype=torch.float64)
    sums.index_add_(0, group, embeddings.double())
    sizes = torch.bincount(group).double()
    pairs = float(sizes.sum().square() - sizes.square().sum())
    cosines = float(sums.sum(0).square().sum() - sums.square().sum())
    return cosines / pairs if pairs else float("nan")


def wins(
    top: Float[Tensor, "latents top width"],
    sample: Float[Tensor, "latents sample width"],
    random: Float[Tensor, "windows width"],
) -> Float[Tensor, "latents sample windows"]:
    """1 where a sampled window is closer to the centroid of a latent's top ones than a random one
    is, ½ where they tie; of unit embeddings."""
    centroid = normalize(top.sum(1), dim=1)
    one, other = sample @ centroid[:, :, None], (centroid @ random.T)[:, None, :]
    return ((one > other).float() + (one >= other)) / 2


def strange_pairs(
    top: Int[Tensor, "latents top"], sample: Int[Tensor, "latents sample"], random: Tensor
) -> Bool[Tensor, "latents sample windows"]:
    """Pairs of a sampled and a random window whose numbers are none of the top windows'."""
    return ~_among(sample, top)[:, :, None] & ~_among(random, top)[:, None, :]


def fair_pairs(
    silent: Bool[Tensor, "latents windows"], documents: Sequence[Tensor], genre: Tensor
) -> Bool[Tensor, "latents sample windows"]:
    """Pairs of a sampled and a silent window of one genre that are in no document of a top window.
    ``documents`` are those of the top, sampled and random windows, ``genre`` has a number for
    each."""
    _, of_sample, of_random = documents
    alike = genre[of_sample][:, :, None] == genre[of_random]
    return silent[:, None, :] & alike & strange_pairs(*documents)


def share_won(
    wins: Float[Tensor, "latents p n"], pairs: Bool[Tensor, "latents #p n"]
) -> Float[Tensor, " latents"]:
    """Share of the pairs that are won, the area under a ROC curve; NaN where too few windows take
    part."""
    counted = pairs.expand_as(wins).float()
    of_positive = counted.sum(2)  # sums of ½ and 1 are exact in float32 up to 2^23 pairs
    enough = (of_positive > 0).sum(1) >= FEWEST_POSITIVE
    enough &= (counted.amax(1) > 0).sum(1) >= FEWEST_NEGATIVE
    share = (wins * counted).sum((1, 2)).double() / of_positive.sum(1).double()
    return share.where(enough, torch.nan)


def _resampled(
    wins: Float[Tensor, "latents p n"],
    pairs: Bool[Tensor, "latents p n"],
    documents: Sequence[Tensor],
    drawn: Float[Tensor, "resamplings documents"],
) -> Float[Tensor, "latents resamplings"]:
    """The share won, each pair counted as often as both of its documents were drawn."""
    _, of_positive, of_negative = (drawn.T[own] for own in documents)

    def counted(marked: Tensor) -> Tensor:
        return ((marked @ of_negative) * of_positive).double().sum(1)

    return counted(wins * pairs) / counted(pairs.float())


def _among(numbers: Tensor, of_top: Tensor) -> Bool[Tensor, "latents some"]:
    """Whether each number, of every latent or the same for all, is one of its top contexts'."""
    return (numbers[..., None] == of_top[:, None, :]).any(-1)
