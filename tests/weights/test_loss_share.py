"""Where a weighted loss lies, and the warning when few dimensions dominate it."""

import pytest
import torch

from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.choosing import weights_from_rule
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_share import (
    collapse_warning,
    effective_dimensions,
    loss_share,
    stretching,
)
from llm_wsae.weights.loss_weights import LossWeights


def wide():
    """100 dimensions, of which number 7 varies 30 times as much as the others."""
    x = torch.randn(2000, 100, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 30
    return Statistics(100, 16).update(x, torch.arange(2000) % 16)


def test_shares_by_hand(statistics):
    variance, gamma = statistics.robust_variance, torch.tensor([1.0, 0.0, 3.0, 0.5])
    expected = gamma.double() ** 2 * variance
    found = loss_share(LossWeights(gamma), statistics)
    torch.testing.assert_close(found, expected / expected.sum())
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    m = matrix.double()
    values = torch.linalg.eigvalsh(m @ statistics.robust_covariance @ m.T).flip(0)
    found = loss_share(LossWeights(matrix), statistics)
    torch.testing.assert_close(found, values / values.sum())


def test_effective_dimensions(statistics, inputs):
    even = weights_from_rule("robust-variance", -0.5, statistics)
    assert effective_dimensions(even, statistics) == pytest.approx(4, rel=1e-6)
    white = weights_from_rule("whitening", 1.0, inputs, WeightConfig(place="space"))
    assert effective_dimensions(white, statistics) == pytest.approx(4, rel=1e-5)
    one = LossWeights(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert effective_dimensions(one, statistics) == pytest.approx(1)


def test_weights_of_tokens_move_the_loss():
    """Weighted down, rows of large norm leave the loss, and with them the dimension they lie in."""
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    x[::20, 3] *= 8
    found = Statistics(8, 16).update(x, torch.arange(4000) % 16)
    plain, tokens = (weights_from_rule(rule, -0.5, found) for rule in ("uniform", "token-norm"))
    assert float(loss_share(tokens, found)[3]) < float(loss_share(plain, found)[3])
    assert effective_dimensions(tokens, found) > effective_dimensions(plain, found)


def test_the_warning(statistics):
    assert (
        collapse_warning(weights_from_rule("robust-variance", -0.5, statistics), statistics) is None
    )
    found = wide()
    for rule, alpha, sentence in [
        ("variance", 1.0, "so a dictionary trained with it explains those and neglects the rest"),
        ("uniform", 1.0, "as it is in the activations themselves"),
        ("token-norm", 0.0, "as it is in the activations themselves"),
    ]:
        warning = collapse_warning(weights_from_rule(rule, alpha, found), found)
        assert "dominated by 1." in warning and "of 100 dimensions (1." in warning
        assert "dimension 7 alone carries" in warning and sentence in warning
    matrix = collapse_warning(weights_from_rule("whitening", -1.0, found), found)
    assert "dominated by 1.0 of 100 directions (1.0%; one direction alone carries 100%)" in matrix


def test_stretching_is_gamma_or_singular_values():
    gamma = torch.tensor([3.0, 1.0, 2.0])
    assert stretching(LossWeights(gamma)).tolist() == [3, 1, 2]
    q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    found = stretching(LossWeights(q @ gamma.diag()))
    torch.testing.assert_close(found, torch.tensor([3.0, 2.0, 1.0]).double())
