"""Can a latent's contexts be distinguished from others by their meaning? Detection without a judge.

The centroid of a latent's top contexts, as sentence embeddings, serves as its "explanation". It is
tested on other contexts: those sampled over all quantiles of the latent's activation, against
random windows where the latent is silent. The score is the area under the ROC curve of the
similarity to the centroid: 0.5 for a latent whose contexts have nothing in common.

Subjects and genres could pass for meaning. So documents that hold a top context are left out on
both sides, or a latent that fires in one document would be detected by that document's subject,
whatever it stands for there; and a context is compared only with those of its own genre, or a
latent that prefers speeches to articles would be detected by their style (``Documents``).

Which documents a text holds is chance. Detection is therefore also computed on resamplings of them
(bootstrap, Efron 1979), the same for all latents and dictionaries; a context counts as often as its
document was drawn. The centroid is taken as given.

A latent for one word is detected by that word. What remains without it is measured separately: all
windows, on both sides, whose centre is a token of the top contexts are left out.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from llm_wsae.evaluation.config import FEWEST_NEGATIVE, FEWEST_POSITIVE


def auroc(
    positive: Float[Tensor, "columns p"],
    negative: Float[Tensor, "columns n"],
    positive_counts: Bool[Tensor, "columns p"],
    negative_counts: Bool[Tensor, "columns n"],
) -> Float[Tensor, " columns"]:
    """Probability that a positive item scores above a negative one; a tie counts half.

    Of each column, only the items marked in ``positive_counts`` and ``negative_counts`` are used;
    NaN where one of them marks none.
    """
    ordered = negative.where(negative_counts, torch.inf).sort(1).values
    sought = positive.contiguous()
    below = torch.searchsorted(ordered, sought)
    # Not above: the negatives come before the infinities, which no finite score reaches.
    not_above = torch.searchsorted(ordered, sought, right=True)
    wins = (below + not_above).double().where(positive_counts, 0.0).sum(1) / 2
    return wins / (positive_counts.sum(1) * negative_counts.sum(1))


class Documents(NamedTuple):
    """Where windows come from."""

    top: Int[Tensor, "latents top"]
    """Documents of the top windows; so below."""
    sample: Int[Tensor, "latents sample"]
    random: Int[Tensor, " windows"]
    genre: Int[Tensor, " documents"]
    """A number for the genre of every document."""
    drawn: Float[Tensor, "resamplings documents"]
    """How often each resampling holds each document."""


class Detection(NamedTuple):
    """Areas under the ROC curve; NaN for a latent with too few windows."""

    auroc: Float[Tensor, " latents"]
    without_tokens: Float[Tensor, " latents"]
    """The same without windows whose centre is a token of the top contexts."""
    resampled: Float[Tensor, "latents resamplings"] | None = None
    """``auroc`` on every resampling of the documents, if they are known."""


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
    of_top, of_sample, of_random = tokens
    scores = (sample @ centroid[:, :, None])[:, :, 0], centroid @ random.T
    every = torch.ones_like(of_sample, dtype=torch.bool)
    strange = ~(of_sample[:, :, None] == of_top[:, None, :]).any(2)
    unlike = ~_any_of(of_random, of_top)
    if documents is None:
        return Detection(
            _where_enough(*scores, every, silent),
            _where_enough(*scores, strange, silent & unlike),
        )
    every = ~(documents.sample[:, :, None] == documents.top[:, None, :]).any(2)
    silent = silent & ~_any_of(documents.random, documents.top)
    genre = documents.genre[documents.sample][:, :, None] == documents.genre[documents.random]
    wins = _wins(*scores)
    pairs = genre & (every[:, :, None] & silent[:, None, :])
    strangers = pairs & (strange[:, :, None] & unlike[:, None, :])
    counted, won = pairs.float(), wins * pairs
    auroc = _share_won(won, counted)
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
    won: Float[Tensor, "latents p n"],
    pairs: Float[Tensor, "latents p n"],
    documents: Documents,
) -> Float[Tensor, "latents resamplings"]:
    """The share of won pairs, each counted as often as both of its documents were drawn."""
    drawn = documents.drawn.T  # [documents, resamplings]
    of_negative, of_positive = drawn[documents.random], drawn[documents.sample]

    def counted(marked: Tensor) -> Tensor:
        return ((marked @ of_negative) * of_positive).double().sum(1)

    return counted(won) / counted(pairs)


def _any_of(
    tokens: Int[Tensor, " windows"], of_top: Int[Tensor, "latents top"]
) -> Bool[Tensor, "latents windows"]:
    """Whether each token is one of a latent's; one top context at a time, to save memory."""
    found = torch.zeros(len(of_top), len(tokens), dtype=torch.bool)
    for one in of_top.T:
        found |= one[:, None] == tokens
    return found


def _where_enough(
    positive: Tensor, negative: Tensor, positive_counts: Tensor, negative_counts: Tensor
) -> Tensor:
    enough = positive_counts.sum(1) >= FEWEST_POSITIVE
    enough &= negative_counts.sum(1) >= FEWEST_NEGATIVE
    return auroc(positive, negative, positive_counts, negative_counts).where(enough, torch.nan)
