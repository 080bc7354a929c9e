"""Do other seeds find the same latents? PW-MCC of dictionaries that differ only in their seeds."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from llm_wsae.dictionary.dictionary import Dictionary

MOST_PAIRS = 2**27  # a gigabyte of cosines; with more, the matching takes hours too


def consistency(
    dictionaries: Mapping[str, Dictionary], alive: Mapping[str, Bool[Tensor, " d_sae"]]
) -> dict[str, dict[str, Any]]:
    """PW-MCC of every group of dictionaries that differ only in their seeds: ``dictionaries``,
    ``pw_mcc``, and ``pw_mcc_alive`` over the ``alive`` latents."""
    groups: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for name, dictionary in dictionaries.items():
        info = dictionary.info
        if info.seed is None:
            continue
        other = ("seed", "command", "versions")
        training = {key: value for key, value in info.training.items() if key not in other}
        alike = json.dumps([dictionary.d_sae, info.store, training], sort_keys=True, default=str)
        arm = info.name.removesuffix(f"-s{info.seed}")
        groups[f"{info.site} {arm}", alike].setdefault(info.seed, name)
    result = {}
    for (group, _), members in groups.items():
        if len(members) < 2:
            continue
        if group in result:  # the same arm in another training
            group = f"{group} ({', '.join(members.values())})"
        names = [members[seed] for seed in sorted(members)]
        decoders = {name: dictionaries[name].W_dec.detach() for name in names}
        result[group] = {
            "dictionaries": names,
            "pw_mcc": pw_mcc(list(decoders.values())),
            "pw_mcc_alive": pw_mcc([own[alive[name]] for name, own in decoders.items()]),
        }
    return result


def pw_mcc(decoders: Sequence[Float[Tensor, "_ d_in"]]) -> float:
    """Mean over all pairs of decoders of ``matched_cosine``: the pairwise mean correlation
    coefficient of Song et al. 2025 (arXiv 2505.20254). 1 for the same latents in any order; NaN for
    fewer than two decoders."""
    found = [matched_cosine(one, other) for one, other in combinations(decoders, 2)]
    return sum(found) / len(found) if found else float("nan")


def matched_cosine(
    one: Float[Tensor, "d_one d_in"],
    other: Float[Tensor, "d_other d_in"],
    most_pairs: int = MOST_PAIRS,
) -> float:
    """Mean cosine of the rows, matched one to one so that their sum is largest (the Hungarian
    method); unmatched rows do not count. NaN without rows.

    For more than 2²⁷ pairs (11,585 rows each), only that many pairs are used, with rows of ``one``
    drawn at random: the mean is then slightly too high, because fewer rows compete.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    most = max(1, most_pairs // max(1, len(other)))
    if len(one) > most:
        drawn = torch.randperm(len(one), generator=torch.Generator().manual_seed(0))[:most]
        one = one[drawn.to(one.device)]
    cosines = (normalize(one, dim=1) @ normalize(other, dim=1).T).cpu().double().numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return float(cosines[rows, columns].mean()) if len(rows) else float("nan")
