"""What is lost with a concept when its latents are removed: selectivity and spill.

The contributions of the latents (activation × decoder row) are subtracted from the activations. A
monosemantic dictionary then loses that concept and no other: selectivity is the drop in accuracy of
the concept's own dense probe, minus the mean drop of all other concepts' probes. The probes are
those of the unchanged activations. They are linear, so they need not be applied again: their scores
fall by activation × (decoder row · probe direction). Accuracy is the mean over both classes at the
probe's own threshold; the area under the ROC curve would hardly change where a probe is nearly
perfect.

The mean drop of all others is near 0, whatever is removed, so selectivity is nearly the own drop.
*Spill* looks at the other side alone: what the five other concepts that are hit hardest lose, at
the same own drop for every dictionary and concept.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.evaluation.monosemanticity.probing import Exam, SelectedColumns, accuracy

HIT_HARDEST = 5
MATCHED_FALL = 0.05
"""Own drop at which spill is read off, between removals of 0, 1, 2 and 5 latents."""


def falls(
    removed: Int[Tensor, "sets count"],
    decoder: Float[Tensor, "d_sae d_in"],
    exam: Exam,
    table: Float[Tensor, "d_sae units"],
) -> Float[Tensor, "sets concepts"]:
    """Drop in accuracy of every concept's probe when one of the sets of latents is removed.

    -1 in a set stands for no latent.
    """
    taken = SelectedColumns.of(table, removed)
    # What an activation of 1 of each latent adds to each concept's score; 0 for "no latent".
    share = decoder[taken.columns].float() @ exam.directions
    share = torch.nn.functional.pad(share, (0, 0, 0, 1))
    is_removed = torch.zeros(len(removed), len(share))
    is_removed.scatter_(1, taken.place, 1.0)
    split = exam.split
    after = []
    for concept, (items, scores) in enumerate(zip(split.items, exam.scores, strict=True)):
        lost = (taken.values[items] * share[:, concept]) @ is_removed.T  # [items, sets]
        left = (scores[:, None] - lost).T
        after.append(accuracy(left, split.counts[concept], split.num_examples))
    return accuracy(exam.scores, split.counts, split.num_examples) - torch.stack(after, 1)


def selectivity(
    falls: Float[Tensor, "concepts concepts"],
) -> tuple[Float[Tensor, " concepts"], Float[Tensor, " concepts"]]:
    """From the drop of concept j when concept i's latents are removed, [i, j]: the own drops, and
    the others' mean (NaN if there is no other concept)."""
    own = falls.diagonal()
    return own, (falls.sum(1) - own) / (falls.shape[0] - 1)


def spill(by_size: Mapping[int, Float[Tensor, "concepts concepts"]]) -> Float[Tensor, " concepts"]:
    """From the drop of concept j when concept i's best latents are removed, [i, j], by their
    number: the mean of the largest drops of others where the own drop is ``MATCHED_FALL``.

    Between two numbers of latents, both drops are taken to grow in step. NaN for a concept whose
    own drop never gets there, or that has too few others.
    """
    concepts = len(next(iter(by_size.values())))
    found = torch.full((concepts,), torch.nan, dtype=torch.float64)
    if concepts <= HIT_HARDEST:
        return found
    before = (torch.zeros_like(found), torch.zeros_like(found))
    for falls_now in by_size.values():
        own = falls_now.diagonal()
        others = falls_now.masked_fill(torch.eye(concepts, dtype=torch.bool), -torch.inf)
        hit = others.topk(HIT_HARDEST, dim=1).values.mean(1)
        there = found.isnan() & (own >= MATCHED_FALL)
        share = (MATCHED_FALL - before[0]) / (own - before[0]).clamp(min=1e-12)
        found = torch.where(there, before[1] + share * (hit - before[1]), found)
        before = (own, hit)
    return found
