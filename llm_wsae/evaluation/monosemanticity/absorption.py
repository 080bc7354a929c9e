"""Feature absorption: a concept's latents are silent, and one of its special cases speaks for it.

A latent for "begins with s" may stay silent on *short* because a latent for *short* contains the
letter. It then looks like a latent for s and is none. Chanin et al. 2024 (arXiv 2409.14507) found
this and measured it on first letters. What follows is our own version, on our own probes of the
words in a text; its numbers are not those of SAEBench.

A letter's main latents are those that a sparse probe of it needs (``main_latents``). On tokens of
the letter that the dense probe recognises, the letter is *missed* if no main latent is active, and
*absorbed* if, in addition, one other latent contributes to the probe's score, by activation ×
(decoder row · probe direction), at least half of what separates the letter's mean score from that
of all other words.
"""

from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_wsae.evaluation.monosemanticity.probing import PROBE_SIZES, Exam, best_columns
from llm_wsae.statistics.measures import LETTER

GAIN = 0.02
"""More main latents are taken as long as they add this much area under the ROC curve."""
SHARE = 0.5
"""Of the distance between the mean scores, that an absorbing latent contributes at least."""


def main_latents(
    correlation: Float[Tensor, "concepts d_sae"],
    area: Float[Tensor, "sizes concepts"],
    allowed: Bool[Tensor, " d_sae"],
) -> Int[Tensor, "concepts most"]:
    """The 1, 2 or 5 latents that correlate most, and positively, with each concept; -1 for none.

    ``area`` is that of sparse probes of 1, 2 and 5 latents.
    """
    chosen = best_columns(correlation.where(correlation > 0, -torch.inf), allowed, PROBE_SIZES[-1])
    needed = torch.full((len(correlation),), PROBE_SIZES[0])
    for (size, less), (more, gained) in pairwise(zip(PROBE_SIZES, area, strict=True)):
        needed = needed.where((needed < size) | (gained - less < GAIN), more)
    return chosen.where(torch.arange(PROBE_SIZES[-1]) < needed[:, None], -1)


def absorption(
    exam: Exam,
    table: Float[Tensor, "d_sae units"],
    correlation: Float[Tensor, "concepts d_sae"],
    area: Float[Tensor, "sizes concepts"],
    allowed: Bool[Tensor, " d_sae"],
    decoder: Float[Tensor, "d_sae d_in"],
) -> Float[Tensor, "2 concepts"]:
    """Shares of each letter's recognised examples that are missed, and that are absorbed by one
    other of the ``allowed`` latents.

    NaN for a concept that is no letter or without a recognised example, and where units are more
    than one row, so that the table is not sparse.
    """
    found = torch.full((2, len(exam.families)), torch.nan, dtype=torch.float64)
    letters = [n for n, family in enumerate(exam.families) if family == LETTER]
    if not (table.is_sparse and letters):
        return found
    main = main_latents(correlation, area, allowed)
    columns, units = table.indices()
    contributions = decoder.float() @ exam.directions[:, letters]
    n = exam.split.num_examples
    for number, concept in enumerate(letters):
        score, counts = exam.scores[concept], exam.split.counts[concept]
        examples = exam.split.items[concept, :n][(score[:n] > 0) & counts[:n]]
        apart = score[:n][counts[:n]].mean() - score[n:][counts[n:]].mean()
        is_example = _marked(examples, table.shape[1])
        of_examples = is_example[units].nonzero().squeeze(1)
        unit, column = units[of_examples], columns[of_examples]
        is_main = _marked(main[concept][main[concept] >= 0], len(decoder))[column]
        heard = torch.zeros(len(is_example)).index_add_(0, unit, is_main.float()) > 0
        speaks = table.values()[of_examples] * contributions[column, number]
        speaks = speaks.where(allowed[column] & ~is_main, -torch.inf)
        loudest = torch.zeros(len(is_example)).scatter_reduce_(0, unit, speaks, "amax")
        silent = ~heard[examples]
        taken = silent & (loudest[examples] >= SHARE * apart) & (apart > 0)
        found[0, concept], found[1, concept] = silent.double().mean(), taken.double().mean()
    return found


def _marked(numbers: Tensor, count: int) -> Bool[Tensor, " count"]:
    marks = torch.zeros(count, dtype=torch.bool)
    marks[numbers] = True
    return marks
