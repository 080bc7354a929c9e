"""The measures that compare a dictionary with the truth."""

from itertools import permutations

import pytest
import torch

from llm_wsae.lab.theory.recovery import features_per_latent, matched_loss, measure
from llm_wsae.lab.theory.superposition import Superposition, digon_mixing


def features(rows: int = 4000, sparsity: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    data = Superposition(digon_mixing(2, 1), sparsity)
    return data.mixing, data.features(rows, torch.Generator().manual_seed(0))


def test_the_truth_itself_is_found_whole():
    mixing, x = features()
    order = torch.tensor([2, 0, 3, 1])
    found = measure(mixing.T[order], x[:, order], mixing, x)
    assert found.l_gt == pytest.approx(0, abs=1e-6)
    assert found.mmcs == pytest.approx(1) and found.recovered == 1
    assert found.features_per_latent == pytest.approx(1, abs=0.01)


def test_scale_and_spare_latents_do_not_count_against_a_dictionary():
    mixing, x = features()
    codes = torch.cat([x * torch.tensor([3.0, 0.1, 1, 1]), torch.zeros(len(x), 2)], dim=1)
    decoder = torch.cat(
        [mixing.T / torch.tensor([[3.0], [0.1], [1], [1]]), torch.randn(2, 4)[:, :3]]
    )
    found = measure(decoder, codes, mixing, x)
    assert found.l_gt == pytest.approx(0, abs=1e-6) and found.recovered == 1
    assert found.features_per_latent == pytest.approx(1, abs=0.01)


def test_a_feature_without_a_latent_is_missed_whole():
    x = torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 3.0]])
    assert matched_loss(x[:, :2], x) == pytest.approx(9 / 14)
    # One latent for two features can serve one of them: x = (1, 0), (0, 2), z = 1, 2.
    both = torch.tensor([[1.0, 0], [0, 2.0]])
    z = torch.tensor([[1.0], [2.0]])
    # best for the second: ⟨x₂, z⟩²/‖z‖² = 16/5 of 5
    assert matched_loss(z, both) == pytest.approx(1 - 16 / 25)


def test_the_matching_is_the_best_of_all():
    g = torch.Generator().manual_seed(1)
    x, codes = torch.rand(50, 4, generator=g), torch.rand(50, 5, generator=g)
    best = min(
        sum(
            float(
                (x[:, j] - codes[:, i] * (x[:, j] @ codes[:, i]) / codes[:, i].square().sum())
                .square()
                .sum()
            )
            for j, i in enumerate(chosen)
        )
        for chosen in permutations(range(5), 4)
    ) / float(x.square().sum())
    assert matched_loss(codes, x) == pytest.approx(best, abs=1e-5)


def test_directions_count_with_their_sign():
    mixing, x = features()
    opposite = measure(-mixing.T[:1], x[:, :1], mixing, x)
    # the cosines of −e₀ with e₀, e₁, e₂, −e₂
    assert opposite.mmcs == pytest.approx((-1 + 0 + 0 + 0) / 4) and opposite.recovered == 0
    tilted = torch.tensor([[1.0, 0.2, 0], [0, 1, 1]])
    found = measure(tilted, x[:, :2], mixing, x)
    assert found.recovered == 0.25  # only e₀, at cosine 0.98


def test_spare_latents_that_hardly_fire_do_not_count():
    """What they correlate with is chance, and looks like a mixture of everything."""
    _, x = features()
    rows = torch.randint(len(x), (3, 10), generator=torch.Generator().manual_seed(1))
    rare = torch.zeros(len(x), 10).scatter(0, rows, 0.3)  # each on three rows
    assert features_per_latent(rare, x) > 1.5
    assert features_per_latent(torch.cat([x, rare], 1), x) == pytest.approx(1, abs=0.02)


def test_a_latent_for_two_features_counts_two():
    _, x = features(40_000)
    assert features_per_latent(x[:, :1] + x[:, 1:2], x) == pytest.approx(2, abs=0.05)
    # the second varies twice as much as the first: (1·1 + 2·2) / 3
    assert features_per_latent(torch.cat([x[:, :1], x[:, :1] + x[:, 1:2]], 1), x) == pytest.approx(
        5 / 3, abs=0.03
    )
    constant = features_per_latent(torch.ones(len(x), 1), x)
    assert constant != constant
