"""Do trainings with other seeds find the same latents?

PW-MCC, the pairwise mean correlation coefficient of Song et al. 2025 (arXiv 2505.20254): the
latents of two dictionaries are matched one to one so that the sum of the cosines of their decoder
rows is largest (the Hungarian method); the mean cosine is averaged over all pairs of dictionaries.
It is 1 for the same latents in any order.
"""

from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

_MOST_PAIRS = 2**27  # a gigabyte of cosines; with more, the matching takes hours too


def matched_cosine(one: Float[Tensor, "d_one d_in"], other: Float[Tensor, "d_other d_in"]) -> float:
    """Mean cosine of the rows, matched one to one; unmatched rows do not count. NaN without rows.

    For more than 2²⁷ pairs (11,585 rows each), only that many pairs are used, with rows of ``one``
    drawn at random: the mean is then slightly too high, because fewer rows compete.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    most = max(1, _MOST_PAIRS // max(1, len(other)))
    if len(one) > most:
        drawn = torch.randperm(len(one), generator=torch.Generator().manual_seed(0))[:most]
        one = one[drawn.to(one.device)]
    cosines = (normalize(one, dim=1) @ normalize(other, dim=1).T).cpu().double().numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return float(cosines[rows, columns].mean()) if len(rows) else float("nan")


def pw_mcc(
    decoders: Sequence[Float[Tensor, "_ d_in"]],
    alive: Sequence[Bool[Tensor, " _"]] | None = None,
) -> float:
    """PW-MCC of decoders, over their ``alive`` latents only if given (dead latents match nothing).

    NaN for fewer than two decoders.
    """
    if alive is not None:
        decoders = [decoder[some] for decoder, some in zip(decoders, alive, strict=True)]
    found = [matched_cosine(one, other) for one, other in combinations(decoders, 2)]
    return sum(found) / len(found) if found else float("nan")
