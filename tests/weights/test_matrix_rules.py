"""Matrix rules against brute force in float64, and the laws of their controls."""

import pytest
import torch

from llm_wsae.errors import LlmWsaeError
from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.matrix_rules import (
    EIGENVALUE_FLOOR,
    leading_sensitivity,
    permuted,
    rotated,
    sensitivity,
    spectrum,
    whitening,
)

D = 6


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(D, D, generator=generator)
    x = torch.randn(6000, D, generator=generator) @ mix + 3
    statistics = Statistics(D, 16).update(x, torch.arange(len(x)) % 16)
    half = torch.randn(D, D, generator=generator, dtype=torch.float64)
    return RuleInputs(statistics, fisher=half @ half.T)


def test_too_few_rows_are_not_whitened():
    rows = torch.randn(6, 6)
    with pytest.raises(LlmWsaeError, match="6 rows are too few for the covariance of 6 dimensions"):
        whitening(RuleInputs.of(Statistics(6, 4).update(rows, torch.zeros(6, dtype=torch.long))))


def test_whitening_makes_the_covariance_the_identity(inputs):
    s, sigma = whitening(inputs), inputs.covariance
    torch.testing.assert_close(s @ sigma @ s, torch.eye(D, dtype=torch.float64))
    torch.testing.assert_close(s, s.T)  # the symmetric root: ZCA, not another whitening


def test_sensitivity_is_the_fisher_matrix(inputs):
    torch.testing.assert_close(sensitivity(inputs), inputs.fisher)


def test_rotated_keeps_the_spectrum_only(inputs):
    f = inputs.fisher
    control = rotated(f, 0)
    torch.testing.assert_close(torch.linalg.eigvalsh(control), torch.linalg.eigvalsh(f))
    _, mine = spectrum(f)
    _, theirs = spectrum(control)
    assert float((mine.T @ theirs).diagonal().abs().max()) < 0.95
    assert torch.equal(control, rotated(f, 0)) and not torch.allclose(control, rotated(f, 1))


def test_rotations_are_uniform():
    """The mean of Q diag(s) Qᵀ over all rotations is mean(s)·1."""
    s = torch.diag(torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64))
    mean = sum(rotated(s, draw) for draw in range(3000)) / 3000
    torch.testing.assert_close(mean, 4 * torch.eye(3, dtype=torch.float64), rtol=0, atol=0.2)


def test_permuted_deals_out_rows_and_columns(inputs):
    control = permuted(inputs.fisher, 3)
    order = torch.randperm(D, generator=torch.Generator().manual_seed(3))
    for i in range(D):
        for j in range(D):
            assert control[i, j] == inputs.fisher[order[i], order[j]]


def test_the_floor_makes_any_matrix_invertible():
    values, vectors = spectrum(torch.diag(torch.tensor([0.0, 1e-9, 2.0, 4.0, 6.0])))
    assert values.tolist() == pytest.approx(
        [2 * EIGENVALUE_FLOOR, 2 * EIGENVALUE_FLOOR, 2.0, 4.0, 6.0]
    )
    assert vectors.dtype == torch.float64
    with pytest.raises(LlmWsaeError, match="do not vary"):
        spectrum(torch.zeros(3, 3))
    with pytest.raises(LlmWsaeError, match="NaN"):
        spectrum(torch.full((3, 3), float("nan")))


def test_leading_sensitivity_stretches_few_directions(inputs):
    """Of 48 dimensions F's first three directions; what is left has the mean of the others."""
    half = torch.randn(48, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    fisher = half @ half.T + torch.eye(48)
    found = leading_sensitivity(RuleInputs(inputs.statistics, fisher=fisher))
    values, vectors = torch.linalg.eigh(fisher)
    wanted = torch.cat([values[:45].mean().expand(45), values[45:]])
    torch.testing.assert_close(torch.linalg.eigvalsh(found), wanted)
    torch.testing.assert_close(found @ vectors[:, 45:], values[45:] * vectors[:, 45:])
