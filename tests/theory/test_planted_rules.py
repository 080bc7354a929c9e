"""The rules and arms of the planted experiments, and the stand-in for a language model."""

import pytest
import torch

from llm_wsae.errors import LlmWsaeError
from llm_wsae.statistics.moments import Statistics
from llm_wsae.theory import rules
from llm_wsae.theory.reader import coherence, fisher
from llm_wsae.theory.report import SCORING
from llm_wsae.theory.rules import ARMS, RULES, Known, score, weights
from llm_wsae.theory.superposition import digon_mixing, outliers, planted, rotated
from llm_wsae.weights.rules import RULES as ALL_RULES


def known(sparsity: float = 0.7) -> Known:
    data = planted(digon_mixing(2, 1), sparsity)
    x = data.features(8000, torch.Generator().manual_seed(0))
    rows = data.observe(x)
    return Known(
        Statistics(3, 1).update(rows, torch.zeros(8000, dtype=torch.int64)),
        decoder=data.mixing.T,
        energy=torch.ones(4),
        fisher=fisher(data, rows),
        coherence=coherence(data, x, torch.Generator().manual_seed(1)),
        truth=data,
        draw=1,
    )


def test_every_rule_scores_planted_data_as_its_formula_says():
    e = known()
    found = {name: score(rule, e) for name, rule in RULES.items()}
    assert all(s.shape == (3,) and bool((s >= 0).all()) for s in found.values())
    # Two lone features, one digon. With the true directions in the decoder:
    for rule in ("participation", "participation-true"):
        assert found[rule].tolist() == pytest.approx([1, 1, 0.5])
    for rule in ("gap", "gap-true"):
        assert found[rule].tolist() == pytest.approx([1, 1, 0.5**0.5])
    # E x² − (E x)² of a feature, and twice that; a pair's variance says the opposite of the truth
    variance = 0.3 / 3 - 0.15**2
    assert found["variance"].tolist() == pytest.approx([variance, variance, 2 * variance], rel=0.05)
    for rule in ("kurtosis", "hoyer", "negentropy"):
        assert found[rule][:2].min() > found[rule][2], rule
    # P(x > 0) of a feature; each of a pair is read where it is the larger: together 1 − P(both 0)
    assert found["sensitivity"].tolist() == pytest.approx([0.3, 0.3, 1 - 0.7**2], abs=0.02)
    # Alike is what makes the dimension large: the same feature, or either one of two.
    assert found["semantic"][:2].min() > 1.5 * found["semantic"][2]
    for rule in RULES:  # on other dimensions: the same numbers in another order
        dealt = score(RULES[rule].as_control("permuted"), e)
        assert sorted(dealt.tolist()) == pytest.approx(sorted(found[rule].tolist())), rule


def test_a_planted_reader_is_right_about_a_feature_that_is_alone_in_any_units():
    """Its J is ∂x̂/∂x_p, and a dimension in other units is as sensitive as before."""
    data = rotated(planted(digon_mixing(2, 1), 0.7), torch.Generator().manual_seed(2))
    x = torch.eye(4)
    w = data.mixing
    read = ((data.observe(x) @ w) / w.square().sum(0)).relu()
    torch.testing.assert_close(read, x)
    rows = data.observe(data.features(500, torch.Generator().manual_seed(0)))

    def named(row):
        return (row @ w / w.square().sum(0) - 1e-4).relu()

    jacobian = torch.stack([torch.autograd.functional.jacobian(named, row) for row in rows])
    wanted = (jacobian.mT @ jacobian).double().mean(0)
    torch.testing.assert_close(fisher(data, rows), wanted, rtol=1e-5, atol=1e-6)
    lone = planted(digon_mixing(2, 1), 0.7)
    large, rows = outliers(lone, (0,), 20.0), lone.features(500, torch.Generator().manual_seed(0))
    scale = torch.tensor([20.0, 1, 1], dtype=torch.float64)
    found = fisher(large, large.observe(rows)) * scale * scale[:, None]
    torch.testing.assert_close(found, fisher(lone, lone.observe(rows)))


def test_every_rule_that_scores_dimensions_is_held_against_the_truth():
    """A rule added for real models joins the planted table by itself."""
    rest = set(ALL_RULES) - set(RULES)
    assert rest == {"leading-sensitivity", "whitening", "token-norm"}  # matrices, and of tokens
    assert set(SCORING) == set(RULES) - {"uniform"}


def test_weights_have_maximum_one_and_any_exponent():
    e = known()
    for name, arm in ARMS.items():
        found = weights(arm, e)
        assert float(found.max()) == pytest.approx(1) and float(found.min()) >= 0, name
    plain, inverse = weights(ARMS["variance"], e), weights(ARMS["variance-a-0.25"], e)
    torch.testing.assert_close(inverse, (plain / plain.min()) ** -0.25)
    assert weights(ARMS["plain"], e).tolist() == [1, 1, 1]


def test_no_dimension_scores_anything(monkeypatch):
    monkeypatch.setattr(rules, "score", lambda rule, known: torch.zeros(3, dtype=torch.float64))
    with pytest.raises(LlmWsaeError, match="the rule gap scores every dimension 0; take more rows"):
        weights(ARMS["gap"], known())


def test_a_dimension_that_scores_zero(monkeypatch):
    scores = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    monkeypatch.setattr(rules, "score", lambda rule, known: scores)
    assert weights(ARMS["variance-a0.5"], known()).tolist() == [0, 0.5, 1]
    inverse = weights(ARMS["variance-a-0.25"], known())
    assert inverse.tolist() == pytest.approx([1, 1, 4**-0.25])


def test_standardised_inputs_have_one_variance():
    e = known()
    spread = (e.statistics.usual_sample * weights(ARMS["standardised"], e)).var(0)
    assert ARMS["standardised"].space and float(spread.max() / spread.min()) < 1.001


def test_controls_use_their_weights_in_the_same_way():
    assert ARMS["hoyer"].controls == ("random", "permuted:hoyer")
    assert ARMS["hoyer-annealed"].controls == ("random-annealed", "permuted:hoyer-annealed")
    assert ARMS["standardised"].controls == ("permuted:standardised",)
    e = known()
    for name, arm in ARMS.items():
        is_control = name.startswith(("plain", "random", "permuted"))
        assert (arm.controls == ()) == is_control, name
        for control in arm.controls:
            assert ARMS[control].annealed == arm.annealed
        if not is_control:  # as far apart as the arm's, and dealt out to other dimensions
            own = ARMS[f"permuted:{name}"]
            assert own.space == arm.space and own.controls == ()
            spread = weights(own, e).sort().values
            torch.testing.assert_close(spread, weights(arm, e).sort().values)
