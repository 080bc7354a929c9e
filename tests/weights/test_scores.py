"""The formulae of the rules, against numbers known otherwise, and the rules on planted rows."""

import pytest
import torch
from scipy.stats import spearmanr

from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.rules import RULES
from llm_wsae.weights.scores import (
    kurtosis,
    participation,
    random_order,
)


def draw(rows: int, kind: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    if kind == "normal":
        return torch.randn(rows, 1, generator=g)
    uniform = torch.rand(rows, 1, generator=g)
    return uniform if kind == "uniform" else (uniform < 0.1).float()


def test_kurtosis_of_known_distributions():
    assert float(kurtosis(draw(200_000, "normal"))) == pytest.approx(3, rel=0.02)
    assert float(kurtosis(draw(200_000, "uniform"))) == pytest.approx(1.8, rel=0.01)
    p = 0.1
    rare = (1 - 3 * p * (1 - p)) / (p * (1 - p))
    assert float(kurtosis(draw(200_000, "rare"))) == pytest.approx(rare, rel=0.03)


def test_kurtosis_ignores_scale_and_level_and_finds_the_sparse_dimension():
    g = torch.Generator().manual_seed(1)
    sparse = (torch.rand(4001, 1, generator=g) < 0.05) * torch.rand(4001, 1, generator=g)
    samples = torch.cat([torch.randn(4001, 1, generator=g), sparse], dim=1)
    found = kurtosis(samples)
    assert found.dtype == torch.float64
    assert found[1] > 1.5 * found[0]
    torch.testing.assert_close(
        kurtosis(samples * torch.tensor([30.0, 0.1]) + 5), found, rtol=1e-3, atol=1e-6
    )
    assert kurtosis(torch.full((9, 2), 3.0)).tolist() == [0, 0]


def test_participation_counts_the_latents_that_share_a_dimension():
    decoder = torch.tensor([[1.0, 1.0, 0.0], [0.0, -1.0, 0.0], [0.0, 1.0, 0.0]])
    assert participation(decoder).tolist() == pytest.approx([1, 1 / 3, 0])
    # Two of the three are never used: dimension 1 then belongs to one latent.
    assert participation(decoder, torch.tensor([2.0, 0, 0])).tolist() == pytest.approx([1, 1, 0])
    uneven = participation(decoder, torch.tensor([2.0, 1, 1]))
    assert float(uneven[1]) == pytest.approx(6 / 16)


def test_controls():
    order = random_order(20, 3)
    assert order.tolist() != list(range(20)) == sorted(order.tolist())
    assert random_order(20, 3).tolist() == order.tolist() != random_order(20, 4).tolist()


FEATURES = torch.tensor([1, 1, 1, 2, 2, 2, 9, 9])  # in each dimension; orthogonal to the others'


def planted(rows=8000, seed=0):
    """x = W_p f: dimensions of one feature, of an antipodal pair, and of nine features."""
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.zeros(int(FEATURES.sum()), len(FEATURES))
    first = 0
    for dimension, count in enumerate(FEATURES.tolist()):
        signs = torch.ones(count)
        signs[1::2] = -1
        decoder[first : first + count, dimension] = signs
        first += count
    shape = (rows, len(decoder))
    active = torch.rand(shape, generator=generator) > 0.9
    f = active * (1 - torch.rand(shape, generator=generator))
    return f @ decoder, decoder, f


@pytest.fixture(scope="module")
def inputs():
    x, decoder, f = planted()
    return RuleInputs(
        Statistics(len(FEATURES), 16).update(x, torch.arange(len(x)) % 16),
        decoder=decoder,
        energy=f.square().mean(0),
        fisher=torch.diag(torch.arange(1.0, 9.0)).double() + 0.1,
    )


# Rank correlation with the true monosemanticity, one over the number of features. With features
# all alike variance counts them, so the paper's proxy points the wrong way.
KNOWN = {
    "variance": (-1.0, -0.9),
    "kurtosis": (0.9, 1.0),
    "participation": (0.9, 1.0),
    "sensitivity": (-1.0, -0.9),
}


@pytest.mark.parametrize("rule", KNOWN)
def test_planted_dimensions(rule, inputs):
    low, high = KNOWN[rule]
    s = RULES[rule].scores(inputs)
    assert s.dtype == torch.float64 and s.shape == (8,) and float(s.min()) >= 0
    assert low <= spearmanr(s, 1 / FEATURES).statistic <= high + 1e-9


def test_participation_counts_the_features(inputs):
    found = RULES["participation"].scores(inputs)
    torch.testing.assert_close(found, 1 / FEATURES.double(), rtol=0.05, atol=0)


def test_sensitivity_is_the_diagonal(inputs):
    found = RULES["sensitivity"].scores(inputs)
    torch.testing.assert_close(found, torch.arange(1.0, 9.0).double() + 0.1)
