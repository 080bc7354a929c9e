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

from collections.abc import Mapping
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_wsae.evaluation.monosemanticity.probing import PROBE_SIZES, Split, best_columns
from llm_wsae.evaluation.monosemanticity.unit_tables import SparseTable

GAIN = 0.02
"""More main latents are taken as long as they add this much area under the ROC curve."""
SHARE = 0.5
"""Of the distance between the mean scores, that an absorbing latent contributes at least."""


def main_latents(
    correlation: Float[Tensor, "concepts d_sae"],
    area: Mapping[int, Float[Tensor, " concepts"]],
    allowed: Bool[Tensor, " d_sae"],
) -> Int[Tensor, "concepts most"]:
    """The 1, 2 or 5 latents that correlate most, and positively, with each concept; -1 for none.

    ``area`` is that of sparse probes, by their number of latents.
    """
    chosen = best_columns(correlation.where(correlation > 0, -torch.inf), allowed, PROBE_SIZES[-1])
    needed = torch.full((len(correlation),), PROBE_SIZES[0])
    for size, more in pairwise(PROBE_SIZES):
        needed = needed.where((needed < size) | (area[more] - area[size] < GAIN), more)
    return chosen.where(torch.arange(PROBE_SIZES[-1]) < needed[:, None], -1)


def absorption(
    main: Int[Tensor, "concepts most"],
    allowed: Bool[Tensor, " d_sae"],
    table: SparseTable,
    decoder: Float[Tensor, "d_sae d_in"],
    directions: Float[Tensor, "d_in concepts"],
    scores: Float[Tensor, "concepts items"],
    split: Split,
) -> tuple[Float[Tensor, " concepts"], Float[Tensor, " concepts"]]:
    """Shares of each concept's recognised examples that are missed, and that are absorbed by one
    other of the ``allowed`` latents.

    ``directions`` and ``scores`` are those of the dense probes, on the test units of ``split``.
    NaN for a concept without a recognised example.
    """
    missed, absorbed = [], []
    n, units = split.num_examples, table.num_units
    contributions = decoder.float() @ directions
    for concept, own in enumerate(main):
        score, counts = scores[concept], split.counts[concept]
        examples = split.items[concept, :n][(score[:n] > 0) & counts[:n]]
        apart = score[:n][counts[:n]].mean() - score[n:][counts[n:]].mean()
        is_example = torch.zeros(units, dtype=torch.bool)
        is_example[examples] = True
        of_examples = is_example[table.units].nonzero().squeeze(1)
        unit, column = table.units[of_examples], table.columns[of_examples]
        is_main = torch.zeros(len(decoder), dtype=torch.bool)
        is_main[own[own >= 0]] = True
        entry_is_main = is_main[column]
        heard = torch.zeros(units).index_add_(0, unit, entry_is_main.float()) > 0
        speaks = table.values[of_examples] * contributions[column, concept]
        speaks = speaks.where(allowed[column] & ~entry_is_main, -torch.inf)
        loudest = torch.zeros(units).scatter_reduce_(0, unit, speaks, "amax")
        silent = ~heard[examples]
        missed.append(silent.double().mean())
        taken = silent & (loudest[examples] >= SHARE * apart) & (apart > 0)
        absorbed.append(taken.double().mean())
    return torch.stack(missed), torch.stack(absorbed)
