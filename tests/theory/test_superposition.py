"""Planted data is what it says it is."""

import math

import pytest
import torch

from llm_wsae.theory.closed_form import check_assumptions, recovered
from llm_wsae.theory.regimes import OUTLIER_DIMENSIONS, OUTLIER_FACTOR, REGIMES
from llm_wsae.theory.superposition import (
    alone,
    digon_mixing,
    low_coherence,
    mixed_mixing,
    more_frequent,
    planted,
    rotated,
    stronger,
    toy_model,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_features_have_their_frequency_and_strength():
    data = stronger(planted(digon_mixing(2, 1), 0.8), torch.tensor([1]), 3.0)
    x = data.features(100_000, generator())
    active = x > 0
    assert active.float().mean(0).tolist() == pytest.approx([0.2] * 4, abs=0.005)
    for j, amplitude in enumerate([1, 3, 1, 1]):
        strength = x[active[:, j], j]
        assert float(strength.mean()) == pytest.approx(amplitude / 2, rel=0.02)
        assert float(strength.var()) == pytest.approx(amplitude**2 / 12, rel=0.03)
        assert float(strength.max()) <= amplitude
    assert data.mean_active == pytest.approx(0.8)
    together = (active[:, 0] & active[:, 1]).float().mean()
    assert float(together) == pytest.approx(0.04, abs=0.003)  # independent


def test_observation_is_the_mixing():
    data = planted(digon_mixing(1, 1), 0.0)
    x = torch.tensor([[0.5, 1.0, 0.25]])
    assert data.observe(x).tolist() == [[0.5, 0.75]]
    assert data.monosemanticity.tolist() == [1.0, 0.5]


def test_the_digon_mixture():
    mixing = digon_mixing()
    assert mixing.shape == (20, 30)
    found = check_assumptions(mixing)
    assert found.only_digons and sorted(map(len, found.groups)) == [1] * 10 + [2] * 10


def test_the_mixed_mixture():
    mixing = mixed_mixing(generator())
    assert mixing.shape == (20, 38)
    assert (mixing.norm(dim=0) - 1).abs().max() < 1e-6
    assert sorted(map(len, check_assumptions(mixing).groups)) == [1] * 8 + [2] * 6 + [18]
    truth = planted(mixing, 0.5).monosemanticity
    assert truth[:14].tolist() == pytest.approx([1] * 8 + [0.5] * 6)
    assert truth[14:].max() < 0.25
    assert alone(planted(mixing, 0.5)).tolist() == list(range(8))


def test_low_coherence_is_near_the_bound():
    """No 18 unit vectors in 6 dimensions are all below Welch's √((n − d)/(d(n − 1))) = 0.343."""
    columns = low_coherence(6, 18, generator(2))
    cosine = (columns.T @ columns - torch.eye(18)).abs()
    assert math.sqrt(12 / (6 * 17)) <= float(cosine.max()) < 0.45
    random = torch.randn(6, 18, generator=generator(2))
    random /= random.norm(dim=0)
    assert (random.T @ random - torch.eye(18)).abs().max() > 0.6


def test_a_rotation_keeps_the_features_and_hides_the_axes():
    plain = planted(digon_mixing(), 0.5)
    turned = rotated(plain, generator(1))
    torch.testing.assert_close(
        turned.mixing.T @ turned.mixing, plain.mixing.T @ plain.mixing, rtol=0, atol=1e-5
    )
    assert float(plain.monosemanticity.max()) == 1
    assert float(turned.monosemanticity.max()) < 0.3


def test_frequencies_are_at_most_one():
    data = more_frequent(planted(digon_mixing(1, 1), 0.5), torch.tensor([0]), 3.0)
    assert data.probability.tolist() == [1.0, 0.5, 0.5]


def test_every_regime_is_reproducible_and_observed_in_twenty_dimensions():
    for name, build in REGIMES.items():
        if name.startswith("toy"):
            continue
        data = build(0.7, generator(3))
        assert len(data.mixing) == 20
        assert bool((data.mixing == build(0.7, generator(3)).mixing).all()), name
    scale = (
        REGIMES["outliers"](0.7, generator(3)).mixing / REGIMES["mixed"](0.7, generator(3)).mixing
    )
    for dimension in range(20):
        expected = OUTLIER_FACTOR if dimension in OUTLIER_DIMENSIONS else 1.0
        values = scale[dimension][scale[dimension].isfinite()]
        torch.testing.assert_close(values, torch.full_like(values, expected))
    frequent = REGIMES["frequent"](0.7, generator(3))
    assert frequent.probability[:9].tolist() == pytest.approx([0.9] * 8 + [0.3])
    strong = REGIMES["strong"](0.7, generator(3))
    assert strong.amplitude[:9].tolist() == [2.0] * 8 + [1.0]


def test_a_sparse_toy_model_learns_antipodal_pairs():
    """Six features in three dimensions: dense inputs keep three of them, sparse ones keep all."""

    def missed(mixing: torch.Tensor, sparsity: float) -> float:
        x = planted(mixing, sparsity).features(20_000, generator(9))
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
    x = planted(mixing, 0.98).features(4000, generator(6))
    missed = float((x - recovered(mixing, x)).square().sum() / x.square().sum())
    assert missed < 0.8 < 0.9  # 0.9 = 180 of 200 features lost
    assert int((mixing.norm(dim=0) > 0.5).sum()) > 40
