"""The coherence of texts against brute force, and its floor."""

import math
from itertools import combinations

import pytest
import torch
from torch.nn.functional import normalize

from llm_wsae.statistics.coherence import beyond_chance, coherence, coherence_of_strangers


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random unit vectors."""
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_coherence_is_the_mean_cosine_of_all_pairs():
    x = draw(3, 5, 7)
    for found, vectors in zip(coherence(x), x, strict=True):
        pairs = [float(a @ b) for a, b in combinations(vectors, 2)]
        assert float(found) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_strangers_are_pairs_of_different_contexts():
    x, context = draw(6, 7), torch.tensor([4, 4, 2, 7, 7, 7])
    pairs = [float(x[i] @ x[j]) for i, j in combinations(range(6), 2) if context[i] != context[j]]
    found = coherence_of_strangers(x, context)
    assert found == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert math.isnan(coherence_of_strangers(x[:2], context[:2]))


def test_beyond_chance_subtracts_the_strangers_and_has_a_floor():
    strangers, context = draw(200, 16), torch.arange(200)
    alike = draw(1, 16, seed=1).expand(4, 16)
    chosen = torch.stack([alike, draw(4, 16, seed=2)])
    generator = torch.Generator().manual_seed(3)
    found = beyond_chance(chosen, strangers, context, generator)
    chance = coherence_of_strangers(strangers, context)
    assert found.dtype == torch.float64
    assert float(found[0]) == pytest.approx(1 - chance, abs=1e-6)
    opposite = torch.stack([alike[0], -alike[0]]).repeat(2, 1)[None]  # less alike than chance
    floor = beyond_chance(opposite, strangers, context, torch.Generator().manual_seed(3))
    assert 0 < float(floor) < 0.2 and float(found[1]) >= float(floor)
