"""Loss weights: their settings, names and file; what rules make; what rows count under them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import fails, misused
from safetensors.torch import save_file

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.model.site import Site
from llm_wsae.pipeline.plots import plot_profile
from llm_wsae.statistics.moments import SecondMoment, Statistics
from llm_wsae.weights.config import IN_LOSS, WeightConfig
from llm_wsae.weights.loss_weights import (
    LossWeights,
    choose_weights,
    own_weights,
    stretching,
    weights_from_rule,
)
from llm_wsae.weights.profile import (
    collapse_warning,
    effective_dimensions,
    loss_share,
    profile,
    profile_text,
)
from llm_wsae.weights.rules import OWN, RULES, Rule
from llm_wsae.weights.scoring import RuleInputs

SPACE = WeightConfig(place="space")


def test_what_cannot_be_is_refused():
    """Settings, and weights: those that training and files are given are checked by nobody else."""
    misused("clip must be a factor of at least 1, not 0.5", WeightConfig, clip=0.5)
    misused("a share of the steps", WeightConfig, anneal=1.5)
    misused("only weights in the loss can be annealed", WeightConfig, anneal=0.5, place="space")
    for gamma, form, sentence in (
        (torch.eye(4), "diagonal", "given in, matrix, not diagonal; leave form at"),
        (torch.ones(4), "matrix", "given in, diagonal, not matrix; leave form at"),
        (torch.tensor([1.0, 1, 1, -1]), "auto", "finite and not negative"),
        (torch.tensor([1.0, 1, 1, torch.nan]), "auto", "finite and not negative"),
        (torch.zeros(4), "auto", "leave no dimension"),
        (torch.zeros(4, 4), "auto", "leave no dimension"),
    ):
        fails(sentence, LossWeights, gamma, config=WeightConfig(form=form))
    assert LossWeights(torch.eye(4), config=WeightConfig(form="matrix")).config.form == "matrix"


def test_names_and_labels():
    vector, matrix = torch.ones(4), torch.eye(4)
    for gamma, rule, alpha, more, name in [
        (vector, "variance", -0.25, {"place": "space"}, "variance-a-0.25-space"),
        (vector, "variance", 0.0, {"place": "space"}, "uniform"),
        (vector, "uniform", 1.0, {}, "uniform"),
        (vector, "variance", 0.5, {"clip": 4.0, "anneal": 0.5}, "variance-a0.5-c4-n0.5"),
        (vector, "variance", 0.5, {"draw": 2}, "variance-a0.5"),
        (vector, "permuted:variance", 0.5, {"draw": 2}, "permuted-variance-a0.5-d2"),
        (vector, "permuted:variance", 0.0, {"draw": 2}, "uniform"),
        (matrix, "sensitivity", 0.25, {"place": "space"}, "sensitivity-matrix-a0.25-space"),
        (matrix, "whitening", 1.0, {"place": "space"}, "whitening-a1-space"),
        (matrix, "rotated:sensitivity", 0.25, {"draw": 1}, "rotated-sensitivity-a0.25-d1"),
    ]:
        weights = LossWeights(gamma, Rule.parse(rule), alpha, WeightConfig(**more))
        assert weights.name == name
        assert weights.label == name.removesuffix("-d1").removesuffix("-d2")
    assert LossWeights(vector).name == LossWeights(matrix).name == "own"
    for rule in (OWN, RULES["variance"], RULES["whitening"]):  # nobody has resolved it
        assert LossWeights(vector, rule, config=WeightConfig()).config.place == "loss"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w.safetensors"


def test_a_file_keeps_everything(path):
    config = WeightConfig(place="space", clip=9.0, draw=3)
    for weights in (
        LossWeights(torch.rand(4), RULES["variance"], 0.5),
        LossWeights(torch.rand(4, 4), Rule.parse("rotated:sensitivity"), 0.25, config),
        LossWeights(torch.rand(4), config=config),
    ):
        weights.save(path, {"site": "blocks.0.hook_resid_pre"})
        again = LossWeights.load(path)
        assert torch.equal(again.gamma, weights.gamma)
        kept, given = ((w.name, w.rule, w.alpha, w.config) for w in (again, weights))
        assert kept == given


def test_a_file_is_for_the_site_that_it_names_and_takes_settings_if_no_rule_made_it(path):
    here, there = Site(1, "post"), Site(2, "post")
    save_file({"anything": torch.ones(4)}, path)
    own = LossWeights.load(path, sites=[here, there])
    assert (own.rule, own.alpha, own.config) == (OWN, 1.0, IN_LOSS)
    assert LossWeights.load(path, SPACE).config == SPACE
    LossWeights(torch.ones(4), RULES["variance"], 0.5).save(path, {"site": str(here)})
    for same in (WeightConfig(), IN_LOSS):
        assert LossWeights.load(path, same, [here]).config == IN_LOSS
    misused(r"variance made for the place loss.*drop --place", LossWeights.load, path, SPACE)
    with pytest.raises(UsageError, match=rf"weights of '{here}', not of {there}; make a file"):
        LossWeights.load(path, sites=[here, there])


def test_bad_files_are_refused(path):
    shape, header = "one floating-point number per dimension", "is no weights file|is damaged|not a"
    headers = ("[]", "{", '{"rule": "none"}', '{"rule": 3}', '{"rule": []}', '{"clip": "x"}')
    for tensors, told, sentence in (
        (None, None, "there is no .* weights file"),
        ({"gamma": torch.tensor([1.0, torch.nan])}, None, "the weights must be finite"),
        ({"a": torch.ones(2), "b": torch.ones(2)}, None, "a weights file has one, 'gamma'"),
        *(({"gamma": torch.ones(size)}, None, shape) for size in ((2, 3), (2, 2, 2))),
        ({"gamma": torch.ones(2).int()}, None, shape),
        *(({"gamma": torch.ones(2)}, {"llm_wsae": one}, header) for one in headers),
    ):
        if tensors is not None:
            save_file(tensors, path, told)
        assert str(path) in fails(sentence, LossWeights.load, path)


# --- From rules, or a file, to normalised weights

CONTROLS = ("permuted:variance", "rotated:sensitivity", "rotated:whitening", "permuted:whitening")


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
    if not weights.is_matrix:
        gamma, sigma = gamma.diag(), sigma.diagonal().diag()
    assert weights.gamma.dtype == torch.float32
    variance = float((gamma @ sigma @ gamma.T).trace())
    assert variance == pytest.approx(float(sigma.trace()), rel=1e-5)
    assert float(loss_share(weights, inputs.statistics).sum()) == pytest.approx(1)
    if clip is not None:
        stretch = stretching(weights).sort().values
        assert float(stretch[-1] / stretch[1]) <= clip * 1.001  # [1] is the lower median
        assert float(stretch[1] / stretch[0]) <= clip * 1.001


def test_uniform_is_chosen_once_and_own_weights_come_last(inputs):
    own = LossWeights(torch.tensor([1.0, 2, 3, 4]))
    rules = ["uniform", RULES["variance"], "variance"]
    found = choose_weights(inputs, rules, [0.5, -0.25, 0.5], own, SPACE)
    names = ["uniform", "variance-a0.5-space", "variance-a-0.25-space", "own"]
    assert [weights.name for weights in found] == names
    again = choose_weights(inputs, ["variance"], [0.0, 0.5], LossWeights(own.gamma, config=SPACE))
    assert [weights.name for weights in again] == ["uniform", "variance-a0.5", "own-space"]
    for plain in (found[0], again[0], weights_from_rule("whitening", 0.0, inputs, SPACE)):
        torch.testing.assert_close(plain.gamma, torch.ones(4))
        assert plain.rule.is_plain and (plain.alpha, plain.config) == (1.0, IN_LOSS)


def test_powers_of_a_matrix(inputs):
    """Γ = F^α up to a factor: Γ² ∝ F at ½, Γ ∝ F at 1, and ΓΓ′ ∝ 1 for ±α."""
    for alpha in (0.125, 0.5, 1.0):
        gamma = weights_from_rule("sensitivity", alpha, inputs, SPACE).gamma.double()
        raised = torch.matrix_power(gamma, round(1 / alpha))
        expected = inputs.fisher / inputs.fisher[0, 0]
        torch.testing.assert_close(raised / raised[0, 0], expected, rtol=1e-4, atol=1e-4)
    product = gamma @ weights_from_rule("sensitivity", -1.0, inputs, SPACE).gamma.double()
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(product / product[0, 0], identity, rtol=0, atol=1e-4)


def test_powers_that_lead_into_no_space_are_refused(inputs):
    for rule in ("variance", "whitening"):
        misused("alpha is nan, but must be a number", weights_from_rule, rule, torch.nan, inputs)
        for alpha in (1e6, -1e15):
            with pytest.raises(UsageError, match=r"weights vanish on 3 of 4 dimensions; choose"):
                weights_from_rule(rule, alpha, inputs)
        clipped = weights_from_rule(rule, 1e15, inputs, WeightConfig(clip=3.0))
        assert stretching(clipped).min() > 0.1
    with pytest.raises(LlmWsaeError, match="no space to train in; choose an α nearer to 0, or"):
        weights_from_rule("whitening", -9.0, inputs, SPACE)


def test_variance_rule_is_the_papers(statistics):
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0])
    for alpha, expected in ((0.5, scale), (-0.25, scale**-0.5)):
        gamma = weights_from_rule("variance", alpha, statistics).gamma
        torch.testing.assert_close(gamma / gamma[1], expected, rtol=0.03, atol=0)


def test_a_zero_score_is_a_zero_weight_or_the_largest():
    s = Statistics(3, 8).update(torch.randn(500, 3), torch.arange(500) % 8)

    def weights(alpha, *scores, config=IN_LOSS):
        found = RuleInputs(s, fisher=torch.tensor(scores, dtype=torch.float64).diag())
        return weights_from_rule("sensitivity", alpha, found, config).gamma

    scores = (0.0, 0.2, 0.1)
    gamma = weights(1.0, *scores)
    assert gamma[0] == 0 and float(gamma[1] / gamma[2]) == pytest.approx(2)
    gamma = weights(-1.0, *scores)
    assert gamma[0] == gamma[2] > gamma[1]
    clipped = weights(1.0, *scores, config=WeightConfig(clip=3.0))
    assert float(clipped[0] / clipped[2]) == pytest.approx(1 / 3)
    with pytest.raises(LlmWsaeError, match="no space to train in; choose an α nearer to 0, or"):
        weights(1.0, *scores, config=WeightConfig("space", form="diagonal"))
    fails("'sensitivity' scores every dimension 0, so it prefers", weights, 1.0, 0.0, 0.0, 0.0)
    fails("scores of the rule 'sensitivity' are NaN or infinite", weights, 1.0, *(torch.nan,) * 3)


def test_rows_that_hardly_vary_are_refused_whatever_the_rule():
    still, long = torch.ones(2000, 3), torch.randn(2000, 3) * 1e18
    still[7] = torch.tensor([1.5, 1.0, 0.5])
    for rows, sentence in (
        (still, "apart from a few, the rows do not vary in any dimension; take other rows"),
        (long, r"most rows are longer than 1e\+12, as no model's are; load"),
    ):
        s = Statistics(3, 8).update(rows, torch.arange(2000) % 8)
        for rule in ("uniform", "whitening", "sensitivity"):
            fails(sentence, weights_from_rule, rule, 0.5, s)
        fails(sentence, own_weights, LossWeights(torch.ones(3)), s)


def test_own_weights_are_normalised(statistics):
    gamma = torch.tensor([1.0, 2.0, 3.0, 4.0])
    matrix = torch.tensor([[1.0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 1, -3], [0, 0, 0, 1]])
    for made in (gamma, matrix):  # any invertible one, symmetric or not
        own = own_weights(LossWeights(made), statistics).gamma
        torch.testing.assert_close(own / own.flatten()[0], made)
    own, variance = own_weights(LossWeights(gamma), statistics).gamma, statistics.robust_variance
    assert float(own.double() ** 2 @ variance) == pytest.approx(float(variance.sum()), rel=1e-6)
    with pytest.raises(LlmWsaeError, match="no space to train in; set clip"):
        own_weights(LossWeights(torch.ones(4, 4), config=SPACE), statistics)


def test_own_weights_are_clipped_as_those_of_a_rule(statistics):
    """Also where that makes them a space; a rule's weights, which were clipped, are left alone."""
    gamma = torch.tensor([0.0, 1.0, 8.0, 1e9])
    for config in (WeightConfig(clip=4.0), WeightConfig(place="space", clip=4.0)):
        own = own_weights(LossWeights(gamma, config=config), statistics).gamma
        torch.testing.assert_close(own / own[0], torch.tensor([1.0, 1.0, 4.0, 16.0]))
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(4, 4, generator=draw))[0] for _ in "lr")
    matrix = (left * torch.tensor([0.1, 1.0, 8.0, 1e3])) @ right
    own = own_weights(LossWeights(matrix, config=config), statistics)
    stretch = stretching(own)
    assert (stretch / stretch[-1]).tolist() == pytest.approx([16, 16, 4, 1], rel=1e-3)
    turned = left.T @ own.gamma @ right.T  # the directions are the same
    torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0, atol=1e-4)
    ruled = LossWeights(torch.tensor([1.0, 1, 1, 9]), RULES["variance"], 0.5, config)
    found = own_weights(ruled, statistics).gamma
    assert float(found[3] / found[0]) == pytest.approx(9)


# --- Where a weighted loss lies


@pytest.fixture(scope="module")
def wide():
    """100 dimensions, one with 30 times the spread, two constant; massive rows at position 0."""
    x = torch.randn(6400, 100, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 30
    x[:, [2, 5]] = 0.1  # which the mean of such numbers is not
    positions = torch.arange(len(x)) % 64
    x[positions == 0, 3] = 9000.0
    statistics = Statistics(100, 64).update(x, positions)
    moment = SecondMoment(100).update(statistics.usual_sample)
    return RuleInputs(statistics, second_moment=moment)


def test_shares_by_hand(statistics, inputs):
    gamma = torch.tensor([1.0, 0.0, 3.0, 0.5])
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    covariance = matrix.double() @ statistics.robust_covariance @ matrix.double().T
    for made, expected in (
        (gamma, gamma.double() ** 2 * statistics.robust_variance),
        (matrix, torch.linalg.eigvalsh(covariance).flip(0)),
    ):
        found = loss_share(LossWeights(made), statistics)
        torch.testing.assert_close(found, expected / expected.sum())
    for weights, expected in (
        (weights_from_rule("variance", -0.5, statistics), 4),
        (weights_from_rule("whitening", 1.0, inputs, SPACE), 4),
        (LossWeights(torch.tensor([0.0, 0.0, 1.0, 0.0])), 1),
    ):
        assert effective_dimensions(weights, statistics) == pytest.approx(expected, rel=1e-3)


def test_a_loss_that_few_dimensions_dominate_is_warned_of(wide):
    for rule, alpha, sentences in [
        ("variance", -0.5, ()),
        ("variance", 1.0, ("of 100 dimensions (1.0%; dimension 3 alone", "neglects the rest")),
        ("uniform", 1.0, ("dimension 7 alone", "as it is in the activations themselves")),
        ("whitening", -1.0, ("1.0 of 100 directions (1.0%; one direction alone carries 100%)",)),
    ]:
        warning = collapse_warning(weights_from_rule(rule, alpha, wide), wide.statistics) or ""
        assert bool(warning) == bool(sentences)
        for sentence in sentences:
            assert sentence in warning


def test_the_profile(wide):
    chosen = (("uniform", 1.0), ("variance", -0.5), ("whitening", 0.01))
    weights = [weights_from_rule(rule, alpha, wide) for rule, alpha in chosen]
    inverse = weights[1].gamma
    assert inverse.isfinite().all() and inverse[2] == inverse[5] == inverse.min()
    facts = profile(wide.statistics, weights)
    assert facts["rows"] == 6400 and facts["massive"]["rows"] == 100
    assert facts["massive"]["positions"] == [{"first": 0, "last": 0, "massive": 100, "rows": 100}]
    assert facts["constant_dimensions"] == [2, 5]
    plain, inverse, faint = facts["weights"]
    assert plain["largest"][0]["dimension"] == 7 and plain["largest"][0]["share"] > 0.8
    assert plain["effective_dimensions"] < 2 and inverse["effective_dimensions"] > 96
    assert "is dominated by" in plain["warning"] and inverse["warning"] is None
    assert faint["form"] == "matrix" and "direction" in faint["largest"][0]
    text = profile_text(facts)
    for part in (
        "100 rows, 1.562%: 100 at position 0",
        "variance-a-0.5",
        "1.2 of 100 directions (1.2%; one direction alone carries",
        "warning: 2 dimensions are constant (2, 5), so there is",
    ):
        assert part in text
    assert text.count("warning:") == 3


def test_the_profile_is_drawn(tmp_path, wide):
    path, site = tmp_path / "profile.png", "blocks.1.hook_resid_post"
    weights = [weights_from_rule("variance", alpha / 10, wide) for alpha in range(11)]
    weights.append(weights_from_rule("whitening", 0.5, wide))
    plot_profile(wide.statistics, weights, site, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert height > width > 800
