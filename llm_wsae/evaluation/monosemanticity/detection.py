"""Can a latent's contexts be distinguished from others by their meaning? Detection without a judge.

The centroid of a latent's top contexts, as sentence embeddings, serves as its "explanation". It is
tested on other contexts: those sampled over all quantiles of the latent's activation, against
random windows where the latent is silent. The score is the area under the ROC curve of the
similarity to the centroid: 0.5 for a latent whose contexts have nothing in common.

Contexts on both sides may come from the same documents. Where these are few and long, a latent that
fires in one document is detected by that document's subject, whatever it stands for there.

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


class Detection(NamedTuple):
    """Areas under the ROC curve; NaN for a latent with too few windows."""

    auroc: Float[Tensor, " latents"]
    without_tokens: Float[Tensor, " latents"]
    """The same without windows whose centre is a token of the top contexts."""


def detection(
    top: Float[Tensor, "latents top width"],
    sample: Float[Tensor, "latents sample width"],
    random: Float[Tensor, "windows width"],
    silent: Bool[Tensor, "latents windows"],
    tokens: tuple[
        Int[Tensor, "latents top"], Int[Tensor, "latents sample"], Int[Tensor, " windows"]
    ],
) -> Detection:
    """Detection of latents from the unit embeddings of their windows.

    ``silent`` marks the random windows that are a latent's negatives; ``tokens`` are the centre
    tokens of the top, sample and random windows.
    """
    centroid = normalize(top.sum(1), dim=1)
    of_top, of_sample, of_random = tokens
    scores = (sample @ centroid[:, :, None])[:, :, 0], centroid @ random.T
    every = torch.ones_like(of_sample, dtype=torch.bool)
    strange = ~(of_sample[:, :, None] == of_top[:, None, :]).any(2)
    return Detection(
        _where_enough(*scores, every, silent),
        _where_enough(*scores, strange, silent & ~_any_of(of_random, of_top)),
    )


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
