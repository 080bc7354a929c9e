"""The scores of every eligible latent of one dictionary, from where it fires.

A latent is eligible when it fires in enough contexts for all of its top contexts and, in addition,
all of its sampled ones. Means over eligible latents say nothing about the others, so every mean is
reported with their share: a dictionary with few eligible latents may look good because of what is
left out.

*Detection* asks, without a judge, whether a latent's contexts can be distinguished from others by
their meaning. The centroid of its top contexts, as sentence embeddings, serves as its
"explanation". It is tested on other contexts: those sampled over all quantiles of the latent's
activation, against random windows where the latent is silent. The score is the area under the ROC
curve of the similarity to the centroid: 0.5 for a latent whose contexts have nothing in common.

Subjects and genres could pass for meaning. So documents that hold a top context are left out on
both sides, or a latent that fires in one document would be detected by that document's subject,
whatever it stands for there; and a context is compared only with those of its own genre, or a
latent that prefers speeches to articles would be detected by their style (``Documents``).

Which documents a text holds is chance. Detection is therefore also computed on resamplings of them
(bootstrap, Efron 1979), the same for all latents and dictionaries; a context counts as often as its
document was drawn. The centroid is taken as given.

A latent for one word is detected by that word. What remains without it is measured separately: all
windows, on both sides, whose centre is a token of the top contexts are left out.

*Coherence* is the mean cosine of all pairs of a latent's contexts, less that of random windows of
different contexts: any two windows of a corpus are somewhat alike, and more so in a narrow one.
(The paper measures its vision features in this way: section 5 of arXiv 2506.15963.)
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.evaluation.config import FEWEST_NEGATIVE, FEWEST_POSITIVE, MonosemanticConfig
from llm_wsae.evaluation.heldout import HeldoutText, WindowEmbeddings
from llm_wsae.evaluation.monosemanticity.concepts import Units
from llm_wsae.evaluation.monosemanticity.firings import (
    NO_ROW,
    Examples,
    Firings,
    Recorder,
    quantile_sample,
    silent_windows,
)

RESAMPLED = "detection_resampled"
"""Detection of every latent on resamplings of the documents, beside its scores."""
_RESAMPLINGS = 100
_LATENTS_AT_ONCE = 256  # whose embeddings, and pairs of windows, are in memory together


class Documents(NamedTuple):
    """Where windows come from."""

    top: Int[Tensor, "latents top"]  # documents of the top windows; so below
    sample: Int[Tensor, "latents sample"]
    random: Int[Tensor, " windows"]
    genre: Int[Tensor, " documents"]  # a number for the genre of every document
    drawn: Float[Tensor, "resamplings documents"]  # how often each resampling holds each document


class Detection(NamedTuple):
    """Areas under the ROC curve; NaN for a latent with too few windows."""

    auroc: Float[Tensor, " latents"]
    without_tokens: Float[Tensor, " latents"]
    """The same without windows whose centre is a token of the top contexts."""
    resampled: Float[Tensor, "latents resamplings"] | None
    """``auroc`` on every resampling of the documents, if they are known."""


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
        self, dictionary: Dictionary, threshold: float, kinds: list[Units] | None = None
    ) -> Recorder:
        """A recorder of the firings that ``scores`` needs."""
        top, sample, seed = self._config.top, self._config.sample, self._config.seed
        # More than will be used: some are in top contexts, and the rest is chosen by quantile.
        examples = top, top + 4 * sample
        return Recorder(dictionary, threshold, self.text, self.windows, examples, seed, kinds or ())

    def eligible(self, firings: Firings) -> Bool[Tensor, " d_sae"]:
        """The latents that fire in enough contexts."""
        return firings.contexts >= self._config.top + self._config.sample

    def chance(self) -> dict[str, float]:
        """``purity`` and ``entropy`` of the tokens if latents fired at random: of as many random
        windows as a latent has top contexts; NaN if there are fewer windows."""
        # One from each stretch of the text, as top contexts are different contexts.
        top = self._config.top
        count = len(self.random) // top
        rows = self.random[: count * top].view(top, count).T
        found = token_purity(rows, self._token)
        return {name: float(values.mean()) for name, values in found.items()}

    def scores(self, firings: Firings) -> dict[str, Float[Tensor, " d_sae"]]:
        """Every score of all latents, NaN where a latent has none, and ``RESAMPLED`` [d_sae,
        resamplings].

        The scores (``statistics.measures``; ``entropy`` is that of the tokens, in bits) are of a
        latent's top contexts, and ``_sampled`` of those sampled over the quantiles of its
        activation.
        """
        latents = self.eligible(firings).nonzero()[:, 0]
        sample = quantile_sample(firings, self.text, self._config.sample)
        rows = [firings.top.rows, sample.rows]
        self._embeddings.prepare(torch.cat([one[latents] for one in rows], 1))
        found: dict[str, Tensor] = {}
        for some in latents.split(_LATENTS_AT_ONCE):
            for name, values in self._scores_of(firings, sample, some).items():
                shape = (len(firings.counts), *values.shape[1:])
                nothing = torch.full(shape, torch.nan, dtype=torch.float64)
                found.setdefault(name, nothing)[some] = values.double()
        for name in ("coherence", "coherence_sampled"):
            found[name] -= self._strangers
        return found

    def _scores_of(self, firings: Firings, sample: Examples, some: Tensor) -> dict[str, Tensor]:
        scores: dict[str, Tensor] = {}
        top, sampled = firings.top.rows[some], sample.rows[some]
        for suffix, rows in (("", top), ("_sampled", sampled)):
            found = token_purity(rows, self._token)
            scores |= {f"{name}{suffix}": values for name, values in found.items()}
            scores[f"coherence{suffix}"] = coherence(self._embeddings.of(rows))
        of = self.text.document_of
        detected = detection(
            self._embeddings.of(top),
            self._embeddings.of(sampled),
            self._of_random,
            silent_windows(firings, self.text, self.windows, some),
            (self._token[top], self._token[sampled], self._token[self.random]),
            Documents(of[top], of[sampled], of[self.random], self._genre, self._drawn),
        )
        assert detected.resampled is not None
        return scores | {
            "detection": detected.auroc,
            "detection_without_tokens": detected.without_tokens,
            RESAMPLED: detected.resampled,
        }


def _documents(
    text: HeldoutText, seed: int
) -> tuple[Int[Tensor, " documents"], Float[Tensor, "resamplings documents"]]:
    """The genre of every document, and how often each resampling holds it. Documents of one
    genre have the same labels, whatever their values: so do the parts of a joined corpus. The
    last entry, -1, is of rows in no document: a genre of their own, once in each resampling."""
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


def token_purity(
    rows: Int[Tensor, "latents examples"], token: Int[Tensor, " rows"]
) -> dict[str, Float[Tensor, " latents"]]:
    """How far the ``token`` agrees at each latent's rows: ``purity``, the share of the most
    frequent one, and ``entropy`` of their frequencies, in bits. A row of -1 is no example; NaN for
    a latent without examples."""
    there = rows != NO_ROW
    found = token[rows.clamp(min=0)]
    same = (found[:, :, None] == found[:, None, :]) & there[:, None, :]  # [latents, each, others]
    number = there.sum(1).double()
    share = same.sum(2).double() / number[:, None]
    # A token of frequency f appears in f·number examples, so this mean is Σ f log2(1/f).
    surprise = torch.where(there, -share.log2(), 0.0).sum(1) / number
    purity = torch.where(there, share, 0.0).amax(1)
    return {"purity": purity.where(number > 0, torch.nan), "entropy": surprise}


def coherence(embeddings: Float[Tensor, "latents examples width"]) -> Float[Tensor, " latents"]:
    """Mean cosine of all pairs of a latent's examples, given as unit vectors.

    The squared norm of the sum of n unit vectors is n + 2 Σ of the pairs' cosines.
    """
    n = embeddings.shape[1]
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


def detection(
    top: Float[Tensor, "latents top width"],
    sample: Float[Tensor, "latents sample width"],
    random: Float[Tensor, "windows width"],
    silent: Bool[Tensor, "latents windows"],
    tokens: tuple[
        Int[Tensor, "latents top"], Int[Tensor, "latents sample"], Int[Tensor, " windows"]
    ],
    documents: Documents | None = None,
) -> Detection:
    """Detection of latents from the unit embeddings of their windows.

    ``silent`` marks the random windows that are a latent's negatives; ``tokens`` are the centre
    tokens of the top, sample and random windows. Without ``documents``, all windows count and are
    compared with each other.
    """
    centroid = normalize(top.sum(1), dim=1)
    similarity = (sample @ centroid[:, :, None])[:, :, 0], centroid @ random.T
    of_top, of_sample, of_random = tokens
    strange, unlike = ~_shared(of_sample, of_top), ~_any_of(of_random, of_top)
    pairs = silent[:, None, :].expand(-1, sample.shape[1], -1)
    if documents is not None:
        genre = documents.genre
        pairs = pairs & (genre[documents.sample][:, :, None] == genre[documents.random])
        pairs &= ~_shared(documents.sample, documents.top)[:, :, None]
        pairs &= ~_any_of(documents.random, documents.top)[:, None, :]
    wins = _wins(*similarity)
    strangers = pairs & strange[:, :, None] & unlike[:, None, :]
    counted, won = pairs.float(), wins * pairs
    auroc = _share_won(won, counted)
    resampled = None
    if documents is not None:
        resampled = _resampled(won, counted, documents).where(~auroc.isnan()[:, None], torch.nan)
    return Detection(auroc, _share_won(wins * strangers, strangers.float()), resampled)


def _wins(
    positive: Float[Tensor, "latents p"], negative: Float[Tensor, "latents n"]
) -> Float[Tensor, "latents p n"]:
    """1 where a positive window scores above a negative one, ½ where they tie."""
    one, other = positive[:, :, None], negative[:, None, :]
    return ((one > other).float() + (one >= other)) / 2


def _share_won(
    won: Float[Tensor, "latents p n"], pairs: Float[Tensor, "latents p n"]
) -> Float[Tensor, " latents"]:
    """Share of the pairs, each 1 or 0, that are won; NaN where too few windows take part.

    Sums of ½ and 1 are exact in float32 up to 2^23 pairs.
    """
    of_positive = pairs.sum(2)
    enough = (of_positive > 0).sum(1) >= FEWEST_POSITIVE
    enough &= (pairs.amax(1) > 0).sum(1) >= FEWEST_NEGATIVE
    share = won.sum((1, 2)).double() / of_positive.sum(1).double()
    return share.where(enough, torch.nan)


def _resampled(
    won: Float[Tensor, "latents p n"], pairs: Float[Tensor, "latents p n"], documents: Documents
) -> Float[Tensor, "latents resamplings"]:
    """The share of won pairs, each counted as often as both of its documents were drawn."""
    drawn = documents.drawn.T  # [documents, resamplings]
    of_negative, of_positive = drawn[documents.random], drawn[documents.sample]

    def counted(marked: Tensor) -> Tensor:
        return ((marked @ of_negative) * of_positive).double().sum(1)

    return counted(won) / counted(pairs)


def _shared(numbers: Tensor, of_top: Tensor) -> Bool[Tensor, "latents sample"]:
    """Whether each number of a latent is also among those of its top contexts."""
    return (numbers[:, :, None] == of_top[:, None, :]).any(2)


def _any_of(numbers: Tensor, of_top: Tensor) -> Bool[Tensor, "latents windows"]:
    """The same for numbers of all latents; one top context at a time, to save memory."""
    found = torch.zeros(len(of_top), len(numbers), dtype=torch.bool)
    for one in of_top.T:
        found |= one[:, None] == numbers
    return found
