"""From rules to normalised weights, and weights from a file."""

from itertools import product

import pytest
import torch
from covariances import second_moment
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.config import IN_LOSS, WeightConfig
from llm_wsae.weights.loss_weights import (
    LossWeights,
    choose_weights,
    own_weights,
    stretching,
    weights_from_rule,
)
from llm_wsae.weights.profile import loss_share
from llm_wsae.weights.rules import RULES, RuleInputs

SPACE = WeightConfig(place="space")
CONTROLS = (
    "permuted:variance",
    "rotated:sensitivity",
    "rotated:whitening",
    "permuted:whitening",
)


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from([*RULES, *CONTROLS]),
    alpha=st.floats(-2, 2),
    place=st.sampled_from(["loss", "space"]),
    clip=st.none() | st.floats(1, 100),
)
def test_every_choice_is_normalised(rule, alpha, place, clip, inputs):
    """E‖Γ(x − μ)‖² = E‖x − μ‖², and no weight is further from the median than the clip."""
    weights = weights_from_rule(rule, alpha, inputs, WeightConfig(place=place, clip=clip))
    gamma, sigma = weights.gamma.double(), inputs.statistics.robust_covariance
    weighted = gamma if weights.is_matrix else torch.diag(gamma)
    if not weights.is_matrix:
        sigma = torch.diag(sigma.diagonal())
    variance = float((weighted @ sigma @ weighted.T).trace())
    assert weights.gamma.dtype == torch.float32
    assert variance == pytest.approx(float(sigma.trace()), rel=1e-5)
    assert float(loss_share(weights, inputs.statistics).sum()) == pytest.approx(1)
    if clip is not None:
        stretch = stretching(weights).sort().values
        assert float(stretch[-1] / stretch[1]) <= clip * 1.001  # [1] is the lower median
        assert float(stretch[1] / stretch[0]) <= clip * 1.001


def test_uniform_is_chosen_once_and_own_weights_come_last(inputs):
    own = LossWeights(torch.tensor([1.0, 2, 3, 4]))
    found = choose_weights(
        inputs, ["uniform", RULES["variance"], "variance"], [0.5, -0.25, 0.5], own, SPACE
    )
    names = ["uniform", "variance-a0.5-space", "variance-a-0.25-space", "own"]
    assert [weights.name for weights in found] == names
    assert found[0].config == IN_LOSS and found[0].alpha == 1.0
    again = choose_weights(inputs, ["variance"], [0.0, 0.5], LossWeights(own.gamma, config=SPACE))
    assert [weights.name for weights in again] == ["uniform", "variance-a0.5", "own-space"]


def test_powers_of_a_matrix(inputs):
    """Γ = F^α up to a factor: Γ² ∝ F at ½, Γ ∝ F at 1, and ΓΓ′ ∝ 1 for ±α."""
    for alpha in (0.125, 0.5, 1.0):
        gamma = weights_from_rule("sensitivity", alpha, inputs, SPACE).gamma.double()
        raised = torch.matrix_power(gamma, round(1 / alpha))
        torch.testing.assert_close(
            raised / raised[0, 0], inputs.fisher / inputs.fisher[0, 0], rtol=1e-4, atol=1e-4
        )
    inverse = weights_from_rule("sensitivity", -1.0, inputs, SPACE).gamma.double()
    product = gamma @ inverse
    torch.testing.assert_close(
        product / product[0, 0], torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-4
    )


def test_half_whitening_leaves_half_of_the_covariance(inputs):
    half = weights_from_rule("whitening", 0.5, inputs, SPACE).gamma.double()
    sigma = inputs.covariance
    root = half @ sigma @ half  # ∝ Σ^½
    torch.testing.assert_close(
        (root @ root) / (root @ root).trace(), sigma / sigma.trace(), rtol=1e-4, atol=1e-5
    )


def test_powers_that_are_no_numbers_or_lead_into_no_space_are_refused(inputs):
    for rule in ("variance", "whitening"):
        for alpha in (float("nan"), float("inf"), -1e308):
            with pytest.raises(UsageError, match=r"alpha is .*, but must be a"):
                weights_from_rule(rule, alpha, inputs)
        for alpha in (1e6, -1e15):
            with pytest.raises(UsageError, match=r"weights vanish on 3 of 4 dimensions; choose"):
                weights_from_rule(rule, alpha, inputs)
        clipped = weights_from_rule(rule, 1e15, inputs, WeightConfig(clip=3.0))
        assert stretching(clipped).min() > 0.1
    with pytest.raises(LlmWsaeError, match="no space to train in; choose an α nearer to 0, or"):
        weights_from_rule("whitening", -9.0, inputs, SPACE)


def test_variance_rule_is_the_papers(statistics):
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0])
    gamma = weights_from_rule("variance", 0.5, statistics).gamma
    torch.testing.assert_close(gamma / gamma[1], scale, rtol=0.03, atol=0)
    inverse = weights_from_rule("variance", -0.25, statistics).gamma
    torch.testing.assert_close(inverse / inverse[1], scale**-0.5, rtol=0.03, atol=0)


def test_alpha_zero_and_uniform_are_the_plain_autoencoder(inputs):
    for rule, alpha in (("uniform", 1.0), ("variance", 0.0), ("whitening", 0.0)):
        weights = weights_from_rule(rule, alpha, inputs, SPACE)
        torch.testing.assert_close(weights.gamma, torch.ones(4))
        assert weights.name == "uniform" and weights.rule.is_plain and weights.config == IN_LOSS


def test_a_zero_score_is_a_zero_weight_or_the_largest():
    s = Statistics(3, 8).update(torch.randn(500, 3), torch.arange(500) % 8)

    def scored(*scores):
        return RuleInputs(s, fisher=torch.tensor(scores, dtype=torch.float64).diag())

    found = scored(0.0, 0.2, 0.1)
    gamma = weights_from_rule("sensitivity", 1.0, found).gamma
    assert gamma[0] == 0 and float(gamma[1] / gamma[2]) == pytest.approx(2)
    gamma = weights_from_rule("sensitivity", -1.0, found).gamma
    assert gamma[0] == gamma[2] > gamma[1]
    clipped = weights_from_rule("sensitivity", 1.0, found, WeightConfig(clip=3.0)).gamma
    assert float(clipped[0] / clipped[2]) == pytest.approx(1 / 3)
    with pytest.raises(LlmWsaeError, match="no space to train in; choose an α nearer to 0, or"):
        weights_from_rule("sensitivity", 1.0, found, WeightConfig("space", form="diagonal"))
    for scores, sentence in (
        ((0.0, 0.0, 0.0), "'sensitivity' scores every dimension 0, so it prefers none; take"),
        ((torch.nan,) * 3, "scores of the rule 'sensitivity' are NaN or infinite"),
    ):
        with pytest.raises(LlmWsaeError, match=sentence):
            weights_from_rule("sensitivity", 1.0, scored(*scores))


def test_a_constant_dimension_stays_finite_under_negative_alpha():
    x = torch.randn(500, 3)
    x[:, 1] = 0.1  # which the mean of 500 such numbers is not
    s = Statistics(3, 8).update(x, torch.arange(500) % 8)
    gamma = weights_from_rule("variance", -1.0, s).gamma
    assert torch.isfinite(gamma).all() and gamma[1] <= gamma[[0, 2]].min()


def test_rows_that_hardly_vary_are_refused_whatever_the_rule_and_alpha():
    x = torch.ones(2000, 3)
    x[7] = torch.tensor([1.5, 1.0, 0.5])
    for rows, sentence in (
        (x, "apart from a few, the rows do not vary in any dimension; take other text"),
        (torch.zeros(2000, 3), "apart from a few, the rows do not vary in any dimension"),
        (torch.randn(2000, 3) * 1e18, r"most rows are longer than 1e\+12, as no model's are; load"),
    ):
        s = Statistics(3, 8).update(rows, torch.arange(2000) % 8)
        found = RuleInputs(s, fisher=torch.eye(3), second_moment=second_moment(s))
        for rule, alpha in product(("uniform", "variance", "whitening", "sensitivity"), (0.0, 0.5)):
            with pytest.raises(LlmWsaeError, match=sentence):
                weights_from_rule(rule, alpha, found)
        for own in (torch.ones(3), torch.eye(3)):
            with pytest.raises(LlmWsaeError, match=sentence):
                own_weights(LossWeights(own), s)


def test_own_weights_are_normalised(statistics):
    gamma = torch.tensor([1.0, 2.0, 3.0, 4.0])
    own = own_weights(LossWeights(gamma), statistics)
    torch.testing.assert_close(own.gamma / own.gamma[0], gamma)
    weighted = float((own.gamma.double() ** 2 * statistics.robust_variance).sum())
    assert weighted == pytest.approx(float(statistics.robust_variance.sum()), rel=1e-6)
    matrix = torch.tensor([[1.0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 1, -3], [0, 0, 0, 1]])
    own = own_weights(LossWeights(matrix), statistics)  # any invertible one, symmetric or not
    torch.testing.assert_close(own.gamma / own.gamma[0, 0], matrix)


def test_bad_own_weights_are_refused(statistics):
    for gamma, config, sentence in [
        (torch.ones(5), WeightConfig(), "for 5 dimensions, but the site has 4"),
        (torch.tensor([1, 1, 1, float("nan")]), WeightConfig(), "finite and not negative"),
        (torch.tensor([1.0, 1, 1, -1]), WeightConfig(), "finite and not negative"),
        (torch.zeros(4), WeightConfig(), "leave no dimension in the loss"),
        (torch.zeros(4, 4), WeightConfig(), "leave no dimension in the loss"),
        (torch.ones(4, 4), SPACE, "no space to train in; set clip"),
    ]:
        with pytest.raises(LlmWsaeError, match=sentence):
            own_weights(LossWeights(gamma, config=config), statistics)


def test_own_weights_are_clipped_as_those_of_a_rule(statistics):
    """Also where that makes them a space; a rule's weights, which were clipped, are left alone."""
    gamma = torch.tensor([0.0, 1.0, 8.0, 1e9])
    for config in (WeightConfig(clip=4.0), WeightConfig(place="space", clip=4.0)):
        own = own_weights(LossWeights(gamma, config=config), statistics).gamma
        torch.testing.assert_close(own / own[0], torch.tensor([1.0, 1.0, 4.0, 16.0]))
    assert own_weights(LossWeights(gamma), statistics).gamma[0] == 0
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(4, 4, generator=draw))[0] for _ in "lr")
    gamma = torch.tensor([0.1, 1.0, 8.0, 1e3])
    own = own_weights(LossWeights((left * gamma) @ right, config=config), statistics)
    stretch = stretching(own)
    assert (stretch / stretch[-1]).tolist() == pytest.approx([16, 16, 4, 1], rel=1e-3)
    turned = left.T @ own.gamma @ right.T  # the directions are the same
    torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0, atol=1e-4)
    ruled = LossWeights(torch.tensor([1.0, 1, 1, 9]), RULES["variance"], 0.5, config)
    found = own_weights(ruled, statistics).gamma
    assert float(found[3] / found[0]) == pytest.approx(9)
