import torch

from llm_wsae.plots import plot_fidelity, plot_profile
from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.choosing import weights_from_rule
from llm_wsae.weights.profile import profile, profile_text


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
    weights = [weights_from_rule("whitening", alpha, statistics) for alpha in (0.01, 1.0)]
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
