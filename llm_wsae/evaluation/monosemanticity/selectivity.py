"""What goes with a concept when its latents are removed? Selectivity.

The contributions of a concept's latents (activation times decoder row) are subtracted from the
activations. A monosemantic dictionary then loses that concept and no other: selectivity is how far
the accuracy of the concept's own dense probe falls, minus the mean fall of all the other concepts'.
The probes are those of the untouched activations; being linear, they are not applied again: what
their scores lose is latents × (decoder row · probe direction). Accuracy is the mean over both
classes, at the probe's own threshold: the order of the scores, which the area under the ROC curve
sees, hardly changes where a probe is nearly perfect.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.evaluation.monosemanticity.probe_tables import Table
from llm_wsae.evaluation.monosemanticity.probing import Split, Taken


@dataclass(frozen=True)
class Probed:
    """The dense probes of one table of units, and what they give to the units they are tested on.

    ``table`` holds the latents of the same units.
    """

    table: Table
    directions: Float[Tensor, "d_in concepts"]
    split: Split
    scores: Float[Tensor, "concepts items"]
    """Above 0 for what the probes take for examples."""


def falls(
    removed: Int[Tensor, "sets count"], decoder: Float[Tensor, "d_sae d_in"], probed: Probed
) -> Float[Tensor, "sets concepts"]:
    """By how much every concept's probe falls when one of the sets of latents is removed.

    -1 in a set stands for no latent.
    """
    taken = Taken.of(probed.table, removed)
    # What one unit of a latent's activation adds to each concept's score; 0 for "no latent".
    share = torch.nn.functional.pad(
        decoder[taken.columns].float() @ probed.directions, (0, 0, 0, 1)
    )
    before = probed.split.accuracy(probed.scores)
    after = []
    for place in taken.place:
        active = taken.values[:, place][probed.split.items]  # [concepts, items, count]
        lost = (active @ share[place].T[:, :, None])[:, :, 0]
        after.append(probed.split.accuracy(probed.scores - lost))
    empty = torch.zeros(0, len(before), dtype=torch.float64)
    return before - (torch.stack(after) if after else empty)


def selectivity(
    falls: Float[Tensor, "concepts concepts"],
) -> tuple[Float[Tensor, " concepts"], Float[Tensor, " concepts"]]:
    """From the fall of concept j when concept i's latents go, [i, j]: own falls, others' mean (NaN
    for a concept without others)."""
    own = falls.diagonal()
    return own, (falls.sum(1) - own) / (falls.shape[0] - 1)
