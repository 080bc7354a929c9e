"""Area under the ROC curve, of many columns of scores at once."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


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
