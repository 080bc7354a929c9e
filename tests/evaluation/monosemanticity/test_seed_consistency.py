import math
from itertools import permutations

import pytest
import torch
from torch.nn.functional import normalize

from llm_wsae.evaluation.monosemanticity import seed_consistency
from llm_wsae.evaluation.monosemanticity.seed_consistency import matched_cosine, pw_mcc


def decoder(seed, rows=6):
    return torch.randn(rows, 9, generator=torch.Generator().manual_seed(seed))


def test_a_permuted_and_scaled_copy_agrees_perfectly():
    one = decoder(0, 40)
    other = one[torch.randperm(40, generator=torch.Generator().manual_seed(1))] * 3
    assert pw_mcc([one, other]) == pytest.approx(1, abs=1e-6)
    assert pw_mcc([one, -other]) < 0.7  # a latent is not its opposite


def test_the_matching_is_the_best_of_all():
    one, other = decoder(0), decoder(1)
    cosines = normalize(one, dim=1) @ normalize(other, dim=1).T
    best = max(
        float(cosines[torch.arange(6), list(order)].mean()) for order in permutations(range(6))
    )
    assert matched_cosine(one, other) == pytest.approx(best, abs=1e-6)


def test_of_too_many_rows_some_are_matched(monkeypatch):
    one, other = decoder(0, 60), decoder(1, 60)
    whole = matched_cosine(one, other)
    monkeypatch.setattr(seed_consistency, "_MOST_PAIRS", 600)  # ten rows of sixty
    assert matched_cosine(one, one.flip(0)) == pytest.approx(1, abs=1e-6)
    assert whole < matched_cosine(one, other) < whole + 0.2


def test_it_is_the_mean_over_pairs_of_alive_latents():
    parts = [decoder(seed) for seed in range(3)]
    pairs = [matched_cosine(parts[i], parts[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert pw_mcc(parts) == pytest.approx(sum(pairs) / 3)
    alive = [torch.arange(6) < 4, torch.ones(6, dtype=torch.bool)]
    assert pw_mcc(parts[:2], alive) == pytest.approx(matched_cosine(parts[0][:4], parts[1]))
    assert math.isnan(pw_mcc(parts[:1]))
    assert math.isnan(pw_mcc(parts[:2], [torch.zeros(6, dtype=torch.bool)] * 2))
