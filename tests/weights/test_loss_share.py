"""Where a weighted loss lies, a site's profile, and the warning when few dimensions dominate."""

import pytest
import torch

from llm_wsae.plots import plot_fidelity, plot_profile
from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.choosing import weights_from_rule
from llm_wsae.weights.config import IN_LOSS, WeightConfig
from llm_wsae.weights.loss_share import (
    collapse_warning,
    effective_dimensions,
    loss_share,
    stretching,
)
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.profile import profile, profile_text


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
    assert effective_dimensions(white, statistics) == pytest.approx(4, rel=1e-3)
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


def site_statistics():
    """100 dimensions, one with 30 times the spread; massive rows at position 0."""
    x = torch.randn(6400, 100, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 30
    positions = torch.arange(len(x)) % 64
    x[positions == 0, 3] = 9000.0
    return Statistics(100, 64).update(x, positions)


def test_the_profile_counts_massive_rows_and_warns_of_the_collapse():
    statistics = site_statistics()
    weights = [
        weights_from_rule("uniform", 1.0, statistics),
        weights_from_rule("robust-variance", -0.5, statistics),
    ]
    facts = profile(statistics, weights)
    assert facts["rows"] == 6400 and facts["massive"]["rows"] == 100
    assert facts["massive"]["positions"] == [{"first": 0, "last": 0, "massive": 100, "rows": 100}]
    plain, inverse = facts["weights"]
    assert plain["largest"][0]["dimension"] == 7 and plain["largest"][0]["share"] > 0.8
    assert plain["effective_dimensions"] < 2 and inverse["effective_dimensions"] > 99
    assert "is dominated by" in plain["warning"] and inverse["warning"] is None

    text = profile_text(facts)
    assert "100 rows, 1.562%: 100 at position 0" in text
    assert text.count("warning:") == 1
    assert "robust-variance-a-0.5" in text


def test_a_matrix_has_directions():
    statistics = site_statistics()
    weights = [weights_from_rule("whitening", alpha, statistics, IN_LOSS) for alpha in (0.01, 1.0)]
    facts = profile(statistics, weights)
    faint, full = facts["weights"]
    assert faint["form"] == full["form"] == "matrix" and full["place"] == "loss"
    assert faint["largest"][0]["share"] > 0.8 and "direction" in faint["largest"][0]
    assert full["effective_dimensions"] > 99.9
    assert faint["gamma_min"] < faint["gamma_max"]
    assert "1.2 of 100 directions (1.2%; one direction alone carries" in profile_text(facts)


def picture_size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_the_figures_are_drawn(tmp_path):
    statistics = site_statistics()
    weights = [weights_from_rule("variance", a, statistics) for a in (0.5, -0.25)]
    weights.append(weights_from_rule("whitening", 0.5, statistics))
    plot_profile(statistics, weights, "blocks.1.hook_resid_post", tmp_path / "profile.png")
    width, height = picture_size(tmp_path / "profile.png")
    assert width > 800 and height > 800
    numbers = {
        "fvu": 0.2,
        "ce_recovered": 0.9,
        "ce_recovered_interval": (0.88, 0.92),
        "kl": 0.3,
        "kl_interval": (0.2, 0.4),
    }
    arms = {"uniform-k32": numbers, "variance-a0.5-k32": {**numbers, "fvu": 0.3}}
    plot_fidelity(arms, "blocks.1.hook_resid_post", tmp_path / "fidelity.png")
    assert picture_size(tmp_path / "fidelity.png")[0] > 800
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fidelity.png", "profile.png"]
