"""The planted experiments' arms: rules, tied TopK dictionaries, paired statistics, verdicts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from llm_wsae.errors import LlmWsaeError
from llm_wsae.statistics.moments import Statistics
from llm_wsae.statistics.second_moment import SecondMoment
from llm_wsae.theory import rules
from llm_wsae.theory.comparison import summarise_arms
from llm_wsae.theory.recovery import measure
from llm_wsae.theory.report import SCORING
from llm_wsae.theory.rules import ARMS, RULES, SHOWN, Known, fisher, score, weights
from llm_wsae.theory.superposition import digon_mixing, outliers, planted, rotated
from llm_wsae.theory.tied import Schedule, encode_tied, tied_gradient, train_tied
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
        second_moment=SecondMoment(3).update(rows),
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
    assert found["gap-true"].tolist() == pytest.approx([1, 1, 0.5**0.5])
    # E x² − (E x)² of a feature, and twice that; a pair's variance says the opposite of the truth
    variance = 0.3 / 3 - 0.15**2
    assert found["variance"].tolist() == pytest.approx([variance, variance, 2 * variance], rel=0.05)
    assert found["kurtosis"][:2].min() > found["kurtosis"][2]
    # P(x > 0) of a feature; each of a pair is read where it is the larger: together 1 − P(both 0)
    assert found["sensitivity"].tolist() == pytest.approx([0.3, 0.3, 1 - 0.7**2], abs=0.02)
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
    assert rest == {"whitening"}  # a matrix
    assert set(SCORING) == set(RULES) - {"uniform"}


def test_weights_have_maximum_one_and_any_exponent():
    e = known()
    for name, arm in ARMS.items():
        found = weights(arm, e)
        values = torch.linalg.eigvalsh(found) if arm.is_matrix else found
        assert float(values.max()) == pytest.approx(1) and float(values.min()) >= 0, name
    plain, inverse = weights(ARMS["variance"], e), weights(ARMS["variance-a-0.25"], e)
    torch.testing.assert_close(inverse, (plain / plain.min()) ** -0.25)
    assert weights(ARMS["plain"], e).tolist() == [1, 1, 1]


def test_whitening_and_the_optimum_of_the_true_mixture():
    """Two lone features, one digon: γ = 1/σ, here on the axes. The sample comes near it."""
    e = known()
    wanted = torch.diag(torch.tensor([1, 1, 0.5**0.5]))
    torch.testing.assert_close(weights(ARMS["optimum-true"], e), wanted)
    torch.testing.assert_close(weights(ARMS["whitening"], e), wanted, rtol=0, atol=0.03)
    assert ARMS["whitening"].controls == ("random", "rotated:whitening")
    assert not ARMS["whitening"].space  # the theorem's optimum is a loss
    turned = replace(e, truth=rotated(e.truth, torch.Generator().manual_seed(2)))
    found = weights(ARMS["optimum-true"], turned)
    gram = turned.truth.mixing.T @ found @ found @ turned.truth.mixing
    torch.testing.assert_close(
        gram, torch.block_diag(torch.eye(2), 0.5 * torch.tensor([[1.0, -1], [-1, 1]])),
        rtol=0, atol=1e-5,
    )  # fmt: skip


def test_no_dimension_scores_anything(monkeypatch):
    monkeypatch.setattr(rules, "score", lambda rule, known: torch.zeros(3, dtype=torch.float64))
    with pytest.raises(
        LlmWsaeError, match="the rule gap-true scores every dimension 0; take more rows"
    ):
        weights(ARMS["gap-true"], known())


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
    assert ARMS["participation"].controls == ("random", "permuted:participation")
    assert ARMS["participation-annealed"].controls == (
        "random-annealed",
        "permuted:participation-annealed",
    )
    assert ARMS["standardised"].controls == ("permuted:standardised",)
    e = known()
    for name, arm in ARMS.items():
        is_control = name.startswith(("plain", "random", "permuted", "rotated"))
        assert (arm.controls == ()) == is_control, name
        for control in arm.controls:
            assert ARMS[control].annealed == arm.annealed
        if not is_control:  # as far apart as the arm's, and dealt out to other dimensions
            own = ARMS[f"{'rotated' if arm.is_matrix else 'permuted'}:{name}"]
            assert own.space == arm.space and own.controls == ()
            spread, wanted = (
                torch.linalg.eigvalsh(found) if arm.is_matrix else found.sort().values
                for found in (weights(own, e), weights(arm, e))
            )
            torch.testing.assert_close(spread, wanted)


DATA = planted(digon_mixing(3, 2), 0.7)  # n = 7, n_p = 5


def schedule(steps: int = 40, rate: float = 0.01) -> Schedule:
    return Schedule(num_latents=10, k=2, steps=steps, batch=64, learning_rate=rate)


def trained(gamma: torch.Tensor, annealed: list[bool], scale=None, steps: int = 40) -> torch.Tensor:
    scale = torch.ones_like(gamma) if scale is None else scale
    return train_tied(DATA, gamma, torch.tensor(annealed), scale, schedule(steps), seed=3)


@pytest.mark.parametrize("is_matrix", [False, True])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_gradient_is_autograds(k, is_matrix):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(3, 10, 5, generator=g).requires_grad_()
    x = torch.randn(3, 50, 5, generator=g)
    gamma = torch.randn(3, 5, 5, generator=g) if is_matrix else torch.rand(3, 1, 5, generator=g)
    pre = torch.bmm(x, w.transpose(1, 2)).relu()
    kept = torch.zeros_like(pre).scatter(-1, pre.topk(k, -1).indices, 1.0)
    error = x - torch.bmm(pre * kept, w)
    seen = torch.bmm(error, gamma.mT) if is_matrix else error * gamma
    seen.square().sum(2).mean(1).sum().backward()
    squared = torch.bmm(gamma.mT, gamma) if is_matrix else gamma.square()
    found = tied_gradient(w.detach(), x, squared, k)
    torch.testing.assert_close(found, w.grad, rtol=1e-4, atol=1e-5)


def test_codes_are_the_k_largest_positive():
    w = torch.eye(4)
    x = torch.tensor([[3.0, 1, 2, -5], [-1, -2, -3, -4], [0, 0, 5, 0]])
    expected = [[3.0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 5, 0]]
    assert encode_tied(w, x, 2).tolist() == expected
    assert encode_tied(w, x, 4).tolist() == [[3.0, 1, 2, 0], [0, 0, 0, 0], [0, 0, 5, 0]]


def test_an_arm_does_not_depend_on_its_neighbours():
    g = torch.Generator().manual_seed(1)
    gamma = torch.rand(7, 5, generator=g)
    together = trained(gamma, [False, True, False, True, False, False, True])
    alone = trained(gamma[5:6], [False])
    torch.testing.assert_close(together[5], alone[0], rtol=1e-3, atol=1e-4)
    assert (together[5] - together[4]).abs().max() > 0.01


def test_a_diagonal_matrix_trains_as_its_weights_do():
    gamma = torch.rand(3, 5, generator=torch.Generator().manual_seed(4))
    annealed = [False, True, True]
    as_matrix = trained(gamma.diag_embed(), annealed, torch.ones(3, 5))
    torch.testing.assert_close(as_matrix, trained(gamma, annealed), rtol=1e-3, atol=1e-4)


def test_arms_of_a_seed_start_and_see_the_same():
    same = trained(torch.ones(2, 5), [False, True])
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=1e-6)


def test_weights_count_until_they_are_annealed_away():
    gamma = torch.tensor([[1.0, 1, 1, 1, 0.01]])
    fixed = trained(gamma, [False], steps=400)[0]
    moved = trained(gamma, [True], steps=400)[0]
    x = DATA.features(4000, torch.Generator().manual_seed(5))
    observed = DATA.observe(x)

    def missed(w: torch.Tensor) -> torch.Tensor:
        return (observed - encode_tied(w, observed, 2) @ w).square().sum(0) / observed.square().sum(
            0
        )

    assert missed(fixed)[4] > 0.5  # nothing in the loss asked for dimension 4
    assert missed(moved)[4] < 0.5 * missed(fixed)[4]


def test_standardising_undoes_an_outlier_exactly():
    """Training in a scaled space is training on scaled data."""
    scale = torch.tensor([[1.0, 1, 20, 1, 1]])
    from_plain = trained(torch.ones(1, 5), [False], scale)
    loud = planted(scale.T * DATA.mixing, 0.7)
    from_loud = train_tied(
        loud, torch.ones(1, 5), torch.tensor([False]), torch.ones(1, 5), schedule(), seed=3
    )
    torch.testing.assert_close(from_plain, from_loud, rtol=1e-3, atol=1e-3)


def test_sparse_digons_are_learned():
    data = planted(digon_mixing(3, 2), 0.9)
    plan = Schedule(num_latents=10, k=1, steps=600, batch=128, learning_rate=0.02)
    one = torch.ones(1, 5)
    w = train_tied(data, one, torch.tensor([False]), one, plan, seed=1)[0]
    x = data.features(4000, torch.Generator().manual_seed(2))
    found = measure(w, encode_tied(w, data.observe(x), 1), data.mixing, x)
    assert found.mmcs > 0.98 and found.recovered == 1
    assert found.l_gt < 0.3  # k = 1 misses the second feature where two are active


def unit(**losses: float) -> dict:
    """One seed, all arms at 0.5 except those named (``-`` written as ``_``)."""
    measures = {"mmcs": 0.7, "recovered": 0.5, "features_per_latent": 2.0, "fvu": 0.1}
    measures |= {"absorbed": None, "merged": 0.25}
    named = {name.replace("_", "-"): loss for name, loss in losses.items()}
    found = {arm: named.get(arm, 0.5) for arm in ARMS}
    return {
        "arms": {
            arm: {"l_gt": loss, "l_gt_one_scale": 2 * loss, **measures}
            for arm, loss in found.items()
        }
    }


def seeds(count: int = 10, noise: float = 0.001, draw: int = 0, **changes: float) -> list[dict]:
    """Seeds at which arms differ from plain by ``changes``, up to a little noise."""
    draw = np.random.default_rng(draw)
    return [
        unit(
            **{
                arm: 0.5 + change + noise * draw.standard_normal()
                for arm, change in changes.items()
            }
        )
        for _ in range(count)
    ]


def test_differences_are_paired_and_in_per_cent_of_plain():
    units = [
        unit(plain=a, participation=a - b) for a, b in ((0.4, 0.04), (0.6, 0.06), (0.5, -0.01))
    ]
    found = summarise_arms(units)["participation"]
    differences = np.array([-0.04, -0.06, 0.01]) / 0.5 * 100
    assert found.change.mean == pytest.approx(differences.mean()) and found.wins == 2
    low, high = stats.t.interval(0.95, 2, loc=differences.mean(), scale=stats.sem(differences))
    assert found.change.interval == pytest.approx((low, high))
    assert found.change_one_scale == found.change and found.l_gt_one_scale == 2 * found.l_gt
    assert found.absorbed is None and found.merged.mean == 0.25
    # nothing else differs: no other arm to correct for but by number
    p = stats.ttest_1samp(differences, 0).pvalue
    assert found.p_holm == pytest.approx(min(1, p * len(SHOWN)))


def test_verdicts_need_the_controls():
    as_random = dict(participation=-0.05, gap_true=-0.05, kurtosis=0.05, random=-0.05)
    found = summarise_arms(seeds(**as_random))
    assert found["participation"].verdict == found["gap-true"].verdict == "no better than a control"
    assert found["participation"].against["random"].mean == pytest.approx(0, abs=0.3)
    assert found["participation"].against["permuted:participation"].mean == pytest.approx(
        -10, abs=0.3
    )
    assert (
        found["kurtosis"].verdict == "worse"
        and found["random"].verdict == "no better than a control"
    )
    assert found["variance"].verdict == "–"
    as_permuted = summarise_arms(seeds(**{"participation": -0.05, "permuted:participation": -0.05}))
    assert as_permuted["participation"].verdict == "no better than a control"
    others = summarise_arms(seeds(**{"participation": -0.05, "permuted:gap-true": -0.05}))
    assert others["participation"].verdict == "better"
    better = summarise_arms(
        seeds(participation=-0.05, participation_annealed=-0.05, random_annealed=-0.05)
    )
    assert better["participation"].verdict == "better"
    assert better["participation"].against["random"].mean == pytest.approx(-10, abs=0.3)
    assert better["participation-annealed"].verdict == "no better than a control"


def test_a_small_difference_in_one_arm_of_many_is_no_finding():
    nothing = {arm.replace("-", "_"): 0.0 for arm in SHOWN}
    units = seeds(noise=0.02, draw=7, **nothing)
    found = summarise_arms(units)
    raw = [stats.ttest_1samp([u["arms"][a]["l_gt"] - 0.5 for u in units], 0).pvalue for a in SHOWN]
    assert min(raw) < 0.05  # some arm looks like something
    assert {s.verdict for s in found.values()} == {"–"}
