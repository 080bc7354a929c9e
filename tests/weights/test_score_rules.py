"""Rules on planted rows whose answer is known."""

import pytest
import torch
from scipy.stats import spearmanr

from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.rules import RULES

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
        coherence=torch.linspace(0.5, 0.1, 8).double(),
    )


# Rank correlation with the true monosemanticity, one over the number of features. With features
# all alike variance counts them, so the paper's proxy points the wrong way.
KNOWN = {
    "variance": (-1.0, -0.9),
    "robust-variance": (-1.0, -0.9),
    "kurtosis": (0.9, 1.0),
    "hoyer": (0.9, 1.0),
    "negentropy": (0.9, 1.0),
    "participation": (0.9, 1.0),
    "semantic": (0.9, 1.0),
    "sensitivity": (-1.0, -0.9),
    "random": (-0.9, 0.9),
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


def test_gap_leaves_the_least_gap(inputs):
    """On orthogonal groups of n features the best γ² is 1/n, dimension by dimension."""
    found = RULES["gap"].scores(inputs)
    torch.testing.assert_close(found, FEATURES.double().rsqrt(), rtol=1e-6, atol=0)


def test_sensitivity_is_the_diagonal(inputs):
    found = RULES["sensitivity"].scores(inputs)
    torch.testing.assert_close(found, torch.arange(1.0, 9.0).double() + 0.1)


def test_random_scores_are_uniform(inputs):
    many = torch.cat([RULES["random"].scores(inputs, draw=i) for i in range(200)])
    assert float(many.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(many.min()) > 0
