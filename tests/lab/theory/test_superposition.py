"""Superposition is what it says it is."""

import pytest
import torch

from llm_wsae.lab.theory.closed_form import check_assumptions, recovered
from llm_wsae.lab.theory.superposition import (
    Superposition,
    digon_mixing,
    toy_model,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_features_have_their_frequency_and_strength():
    data = Superposition(digon_mixing(2, 1), 0.8)
    x = data.features(100_000, generator())
    active = x > 0
    assert active.float().mean(0).tolist() == pytest.approx([0.2] * 4, abs=0.005)
    for j in range(4):
        strength = x[active[:, j], j]
        assert float(strength.mean()) == pytest.approx(1 / 2, rel=0.02)
        assert float(strength.var()) == pytest.approx(1 / 12, rel=0.03)
        assert float(strength.max()) <= 1
    assert data.mean_active == pytest.approx(0.8)
    together = (active[:, 0] & active[:, 1]).float().mean()
    assert float(together) == pytest.approx(0.04, abs=0.003)  # independent


def test_what_is_observed_is_the_mixture_of_the_features():
    data = Superposition(digon_mixing(1, 1), 1.0)
    assert not data.features(50, generator()).any()
    assert data.observe(torch.tensor([[0.5, 1.0, 0.25]])).tolist() == [[0.5, 0.75]]
    mixing = digon_mixing(10, 10)
    assert mixing.shape == (20, 30)
    found = check_assumptions(mixing)
    assert found.only_digons and sorted(map(len, found.groups)) == [1] * 10 + [2] * 10


def test_a_sparse_toy_model_learns_antipodal_pairs():
    """Six features in three dimensions: dense inputs keep three of them, sparse ones keep all."""

    def missed(mixing: torch.Tensor, sparsity: float) -> float:
        x = Superposition(mixing, sparsity).features(20_000, generator(9))
        return float((x - recovered(mixing, x)).square().sum() / x.square().sum())

    keep_half = torch.cat([torch.eye(3), torch.zeros(3, 3)], dim=1)
    sparse = toy_model(6, 3, 0.95, generator(4))
    assert missed(sparse, 0.95) < 0.12 < missed(keep_half, 0.95)
    gram = sparse.T @ sparse
    assert bool((gram.diagonal() > 0.7).all())  # every feature is represented
    assert float((gram - torch.diag(gram.diagonal())).max()) < 0.1  # and none adds to another
    assert float(gram.min()) < -0.7  # pairs lie opposite each other


def test_a_large_toy_model_is_better_than_twenty_features():
    mixing = toy_model(200, 20, 0.98, generator(5), steps=300)
    assert mixing.shape == (20, 200)
    x = Superposition(mixing, 0.98).features(4000, generator(6))
    missed = float((x - recovered(mixing, x)).square().sum() / x.square().sum())
    assert missed < 0.8 < 0.9  # 0.9 = 180 of 200 features lost
    assert int((mixing.norm(dim=0) > 0.5).sum()) > 40
