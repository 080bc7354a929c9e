"""Area under the ROC curve, of many columns of scores at once."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def auroc(
    scores: Float[Tensor, "columns items"],
    positive: Bool[Tensor, "columns items"],
    negative: Bool[Tensor, "columns items"],
) -> Float[Tensor, " columns"]:
    """The chance that a positive item scores above a negative one, a tie counting half.

    Items that are neither do not count. NaN where there is no positive or no negative item.
    """
    ordered = scores.where(negative, torch.inf).sort(1).values
    below = torch.searchsorted(ordered, scores.contiguous())
    # Not above: the negatives come before the infinities, which no finite score reaches.
    not_above = torch.searchsorted(ordered, scores.contiguous(), right=True)
    wins = (below + not_above).double().where(positive, 0.0).sum(1) / 2
    return wins / (positive.sum(1) * negative.sum(1))
