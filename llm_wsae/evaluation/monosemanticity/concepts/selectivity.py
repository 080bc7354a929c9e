"""What is lost with a concept when its latents are removed? Selectivity.

The contributions of a concept's latents (activation × decoder row) are subtracted from the
activations. A monosemantic dictionary then loses that concept and no other: selectivity is the drop
in accuracy of the concept's own dense probe, minus the mean drop of all other concepts' probes. The
probes are those of the unchanged activations. They are linear, so they need not be applied again:
their scores fall by activation × (decoder row · probe direction). Accuracy is the mean over both
classes at the probe's own threshold; the area under the ROC curve would hardly change where a probe
is nearly perfect.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.evaluation.monosemanticity.concepts.probing import SelectedColumns, Split
from llm_wsae.evaluation.monosemanticity.concepts.tables import Table


@dataclass(frozen=True)
class DenseProbeScores:
    """The dense probes of one kind of units, and their scores of the test units.

    ``table`` holds the latents on the same units.
    """

    table: Table
    directions: Float[Tensor, "d_in concepts"]
    split: Split
    scores: Float[Tensor, "concepts items"]
    """Above 0 where a probe predicts an example."""


def falls(
    removed: Int[Tensor, "sets count"],
    decoder: Float[Tensor, "d_sae d_in"],
    probed: DenseProbeScores,
) -> Float[Tensor, "sets concepts"]:
    """Drop in accuracy of every concept's probe when one of the sets of latents is removed.

    -1 in a set stands for no latent.
    """
    taken = SelectedColumns.of(probed.table, removed)
    # What an activation of 1 of each latent adds to each concept's score; 0 for "no latent".
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
    """From the drop of concept j when concept i's latents are removed, [i, j]: the own drops, and
    the others' mean (NaN if there is no other concept)."""
    own = falls.diagonal()
    return own, (falls.sum(1) - own) / (falls.shape[0] - 1)
