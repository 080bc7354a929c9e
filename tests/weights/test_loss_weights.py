import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.loss_weights import (
    LossWeights,
    collapse_warning,
    effective_dimensions,
    loss_share,
    own_weights,
    stretching,
    weights_from_rule,
)
from llm_wsae.weights.rules import RULES, matrix, weighs_tokens

SCALE = torch.tensor([0.5, 1.0, 2.0, 4.0])


@pytest.fixture(scope="module")
def statistics():
    x = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)) * SCALE
    return Statistics(4, 16).update(x, torch.arange(len(x)) % 16)


@pytest.fixture(scope="module")
def inputs(statistics):
    generator = torch.Generator().manual_seed(1)
    half = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    decoder = torch.randn(12, 4, generator=generator)
    return RuleInputs(
        statistics, decoder, torch.rand(12), half @ half.T, torch.rand(4, dtype=torch.float64)
    )


SPACE, MATRIX = WeightConfig(place="space"), WeightConfig(form="matrix")
CONTROLS = ("permuted:variance", "rotated:sensitivity", "rotated:whitening", "permuted:whitening")


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from([*(rule for rule in RULES if not weighs_tokens(rule)), *CONTROLS]),
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


def test_full_whitening_carries_the_loss_evenly(inputs):
    weights = weights_from_rule("whitening", 1.0, inputs, SPACE)
    assert effective_dimensions(weights, inputs.statistics) == pytest.approx(4, rel=1e-5)
    half = weights_from_rule("whitening", 0.5, inputs, SPACE).gamma.double()
    sigma = inputs.statistics.robust_covariance
    root = half @ sigma @ half  # ∝ Σ^½
    torch.testing.assert_close(
        (root @ root) / (root @ root).trace(), sigma / sigma.trace(), rtol=1e-4, atol=1e-5
    )


def test_the_form_follows_the_place(inputs):
    assert not weights_from_rule("sensitivity", 0.5, inputs).is_matrix
    assert weights_from_rule("sensitivity", 0.5, inputs, SPACE).is_matrix
    assert weights_from_rule("sensitivity", 0.5, inputs, MATRIX).is_matrix
    diagonal = WeightConfig(place="space", form="diagonal")
    assert not weights_from_rule("sensitivity", 0.5, inputs, diagonal).is_matrix
    assert weights_from_rule("whitening", 0.5, inputs).is_matrix
    assert not weights_from_rule("variance", 0.5, inputs, SPACE).is_matrix
    with pytest.raises(UsageError, match="'variance' has no matrix form"):
        weights_from_rule("variance", 0.5, inputs, MATRIX)


@pytest.mark.parametrize(
    ("rule", "alpha", "settings", "name"),
    [
        ("variance", 0.5, {}, "variance-a0.5"),
        ("variance", 0.0, {"place": "space"}, "uniform"),
        ("variance", 0.5, {"clip": 4.0, "anneal": 0.5}, "variance-a0.5-c4-n0.5"),
        ("variance", 0.5, {"draw": 2}, "variance-a0.5"),
        ("permuted:variance", 0.5, {"draw": 2}, "permuted-variance-a0.5-d2"),
        ("random", 1.0, {}, "random-a1"),
        ("token-norm", -0.5, {}, "token-norm-a-0.5"),
        ("permuted:token-norm", -0.5, {"draw": 2}, "permuted-token-norm-a-0.5-d2"),
        ("sensitivity", 0.5, {}, "sensitivity-a0.5"),
        ("sensitivity", 0.25, {"place": "space"}, "sensitivity-matrix-a0.25-space"),
        ("whitening", 1.0, {"place": "space"}, "whitening-a1-space"),
        ("rotated:sensitivity", 0.25, {"place": "space"}, "rotated-sensitivity-a0.25-space"),
    ],
)
def test_names(rule, alpha, settings, name, inputs):
    assert weights_from_rule(rule, alpha, inputs, WeightConfig(**settings)).name == name


@pytest.mark.parametrize("rule", ["token-norm", "permuted:token-norm"])
@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.5])
def test_weights_of_tokens_are_normalised(rule, alpha, statistics, tmp_path):
    """Σ_t γ_t²‖x_t‖² = Σ_t ‖x_t‖² over the usual rows; dimensions all count alike."""
    weights = weights_from_rule(rule, alpha, statistics)
    usual = statistics.usual_sample.double()
    x = (usual - usual.mean(0)) / statistics.robust_variance.mean().sqrt()
    every = torch.ones(len(x), dtype=x.dtype)
    counted, squares = weights.of_rows(x, every), x.square().sum(1)
    assert len(set(weights.gamma.tolist())) == 1
    weighted = float(weights.gamma[0].double() ** 2 * (counted @ squares))
    assert weighted == pytest.approx(float(squares.sum()), rel=1e-6)
    if rule == "token-norm":  # under −½ every row is held against its own length
        torch.testing.assert_close(counted, squares.div(4).clamp(min=0.01) ** (2 * alpha))
    else:  # the same weights, of other rows
        plain = weights_from_rule("token-norm", alpha, statistics).of_rows(x, every)
        assert torch.equal(counted.sort().values, plain.sort().values)
        assert alpha == 0 or float((counted == plain).double().mean()) < 0.01
    weights.save(tmp_path / "weights.safetensors")
    found = own_weights(LossWeights.load(tmp_path / "weights.safetensors"), statistics)
    assert found.name == weights.name and torch.equal(found.gamma, weights.gamma)
    assert weights_from_rule("variance", alpha, statistics).of_rows(x, every) is None


def test_weights_of_tokens_are_dealt_out_among_the_unmasked():
    """A masked row neither counts nor gives its score to another one."""
    x = torch.tensor([1.0, 0.0, 2.0, 3.0, 0.0, 4.0])[:, None].expand(6, 4)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    for rule, draw, expected in (
        ("token-norm", 0, [1, 0, 4, 9, 0, 16]),
        ("permuted:token-norm", 0, [4, 0, 9, 16, 0, 1]),
        ("permuted:token-norm", 1, [9, 0, 16, 1, 0, 4]),
    ):
        weights = LossWeights(torch.ones(4), rule, 0.5, WeightConfig(draw=draw))
        assert weights.of_rows(x, mask).tolist() == expected
        assert weights.of_rows(x[:0], mask[:0]).tolist() == []


def test_weights_of_tokens_tell_where_the_loss_lies():
    """Weighed down, rows of large norm leave the loss, and with them the dimension they lie in."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator)
    x[::20, 3] *= 8
    found = Statistics(8, 16).update(x, torch.arange(4000) % 16)
    plain, tokens = (weights_from_rule(rule, -0.5, found) for rule in ("uniform", "token-norm"))
    shares = [float(loss_share(weights, found)[3]) for weights in (plain, tokens)]
    assert shares[1] < shares[0]
    assert effective_dimensions(tokens, found) > effective_dimensions(plain, found)


def test_weights_of_tokens_that_cannot_be(statistics):
    with pytest.raises(UsageError, match="no weight rule 'permutd:token-norm'"):
        weights_from_rule("permutd:token-norm", -0.5, statistics)
    with pytest.raises(LlmWsaeError, match="for 7 dimensions, but the site has 4"):
        own_weights(LossWeights(torch.ones(7), "token-norm", -0.5), statistics)
    still = Statistics(4, 8).update(torch.ones(50, 4), torch.arange(50) % 8)
    with pytest.raises(LlmWsaeError, match="nothing to weigh: the rows do not vary"):
        weights_from_rule("token-norm", -0.5, still)


@pytest.mark.parametrize(
    "settings", [{"place": "space"}, {"clip": 2.0}, {"anneal": 0.5}, {"form": "matrix"}]
)
def test_weights_of_tokens_have_no_settings(settings, statistics):
    with pytest.raises(UsageError, match="weighs tokens, in the loss and throughout"):
        weights_from_rule("token-norm", -0.5, statistics, WeightConfig(**settings))


def test_leading_sensitivity_stretches_few_directions(inputs):
    """Of 48 dimensions F's first three directions; what is left has the mean of the others."""
    half = torch.randn(48, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    fisher = half @ half.T + torch.eye(48)
    found = matrix("leading-sensitivity", RuleInputs(inputs.statistics, fisher=fisher))
    values, vectors = torch.linalg.eigh(fisher)
    wanted = torch.cat([values[:45].mean().expand(45), values[45:]])
    torch.testing.assert_close(torch.linalg.eigvalsh(found), wanted)
    torch.testing.assert_close(found @ vectors[:, 45:], values[45:] * vectors[:, 45:])


def test_a_zero_score_is_a_zero_weight_or_the_largest(inputs):
    s = Statistics(3, 8).update(torch.randn(500, 3), torch.arange(500) % 8)
    found = RuleInputs(s, coherence=torch.tensor([0.0, 0.2, 0.1], dtype=torch.float64))
    gamma = weights_from_rule("semantic", 1.0, found).gamma
    assert gamma[0] == 0 and float(gamma[1] / gamma[2]) == pytest.approx(2)
    gamma = weights_from_rule("semantic", -1.0, found).gamma
    assert gamma[0] == gamma[2] > gamma[1]
    clipped = weights_from_rule("semantic", 1.0, found, WeightConfig(clip=3.0)).gamma
    assert float(clipped[0] / clipped[2]) == pytest.approx(1 / 3)
    with pytest.raises(LlmWsaeError, match="no space to train in; lower α or set clip"):
        weights_from_rule("semantic", 1.0, found, SPACE)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"clip": 0.5}, "clip must be a factor of at least 1"),
        ({"anneal": 1.5}, "a share of the steps"),
        ({"anneal": 0.5, "place": "space"}, "only weights in the loss can be annealed"),
        ({"draw": -1}, "draw must not be negative"),
    ],
)
def test_settings_that_cannot_be(settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        WeightConfig(**settings)


def test_variance_rule_is_the_papers(statistics):
    gamma = weights_from_rule("variance", 0.5, statistics).gamma
    torch.testing.assert_close(gamma / gamma[1], SCALE, rtol=0.03, atol=0)
    inverse = weights_from_rule("variance", -0.25, statistics).gamma
    torch.testing.assert_close(inverse / inverse[1], SCALE**-0.5, rtol=0.03, atol=0)


def test_alpha_zero_and_uniform_are_the_plain_autoencoder(statistics):
    for weights in (
        weights_from_rule("uniform", 1.0, statistics),
        weights_from_rule("variance", 0.0, statistics),
    ):
        torch.testing.assert_close(weights.gamma, torch.ones(4))
        assert weights.name == "uniform"


def test_effective_dimensions_and_the_warning(statistics):
    whitened = weights_from_rule("robust-variance", -0.5, statistics)
    assert effective_dimensions(whitened, statistics) == pytest.approx(4, rel=1e-6)
    assert collapse_warning(whitened, statistics) is None
    wide = Statistics(100, 16)
    x = torch.randn(2000, 100)
    x[:, 7] *= 30
    wide.update(x, torch.arange(2000) % 16)
    collapsed = weights_from_rule("variance", 1.0, wide)
    assert effective_dimensions(collapsed, wide) == pytest.approx(1, abs=0.05)
    assert "hangs on 1.0 of 100 dimensions (1.0%; dimension 7 alone carries 100%)" in (
        collapse_warning(collapsed, wide)
    )


def test_a_constant_dimension_stays_finite_under_negative_alpha():
    x = torch.randn(500, 3)
    x[:, 1] = 2.0
    s = Statistics(3, 8).update(x, torch.arange(500) % 8)
    gamma = weights_from_rule("variance", -1.0, s).gamma
    assert torch.isfinite(gamma).all() and gamma[1] <= gamma[[0, 2]].min()
    constant = Statistics(3, 8).update(torch.ones(5, 3), torch.arange(5))
    with pytest.raises(LlmWsaeError, match="rows do not vary"):
        weights_from_rule("variance", 1.0, constant)


def test_unknown_rule_offers_the_nearest(statistics):
    with pytest.raises(UsageError, match=r"no weight rule 'varience'; did you mean 'variance'"):
        weights_from_rule("varience", 1.0, statistics)


def test_save_and_load(tmp_path, statistics):
    weights = weights_from_rule("variance", 0.5, statistics)
    weights.save(tmp_path / "w.safetensors")
    again = LossWeights.load(tmp_path / "w.safetensors")
    assert torch.equal(again.gamma, weights.gamma)
    assert (again.rule, again.alpha, again.name) == ("variance", 0.5, "variance-a0.5")


def test_own_vector(tmp_path, statistics):
    save_file({"anything": torch.tensor([1.0, 2.0, 3.0, 4.0])}, tmp_path / "own.safetensors")
    own = own_weights(LossWeights.load(tmp_path / "own.safetensors"), statistics)
    torch.testing.assert_close(own.gamma / own.gamma[0], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert own.name == "own"


def test_own_matrix(tmp_path, inputs):
    """Any invertible matrix will do, symmetric or not."""
    matrix = torch.tensor([[1.0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 1, -3], [0, 0, 0, 1]])
    save_file({"gamma": matrix}, tmp_path / "own.safetensors")
    own = own_weights(LossWeights.load(tmp_path / "own.safetensors"), inputs)
    torch.testing.assert_close(own.gamma / own.gamma[0, 0], matrix)
    singular = LossWeights(torch.ones(4, 4), "own", 1.0, SPACE)
    with pytest.raises(LlmWsaeError, match="no space to train in"):
        own_weights(singular, inputs)
    settings = WeightConfig(place="space", clip=9.0, draw=3)
    weights = weights_from_rule("rotated:sensitivity", 0.25, inputs, settings)
    weights.save(tmp_path / "w.safetensors", {"site": "blocks.0.hook_resid_pre"})
    again = LossWeights.load(tmp_path / "w.safetensors")
    assert torch.equal(again.gamma, weights.gamma)
    assert (again.name, again.config) == (weights.name, settings)


@pytest.mark.parametrize(
    ("gamma", "sentence"),
    [
        (torch.ones(5), "for 5 dimensions, but the site has 4"),
        (torch.tensor([1, 1, 1, float("nan")]), "finite and not negative"),
        (torch.tensor([1.0, 1, 1, -1]), "finite and not negative"),
        (torch.zeros(4), "leave no dimension in the loss"),
    ],
)
def test_bad_vectors_are_refused(gamma, sentence, statistics):
    with pytest.raises(LlmWsaeError, match=sentence):
        own_weights(LossWeights(gamma, "own", 1.0), statistics)


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(LlmWsaeError, match=r"there is no .*weights file"):
        LossWeights.load(path)
    path.write_bytes(b"\x00" * 40)
    with pytest.raises(LlmWsaeError, match="not a readable weights file"):
        LossWeights.load(path)
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, path)
    with pytest.raises(LlmWsaeError, match="a weights file has one, 'gamma'"):
        LossWeights.load(path)
    for wrong in (torch.ones(2, 3), torch.ones(2, 2, 2), torch.ones(2).int()):
        save_file({"gamma": wrong}, path)
        with pytest.raises(LlmWsaeError, match="one floating-point number per dimension"):
            LossWeights.load(path)
    for header in ("[]", "{", '{"rule": "none"}', '{"place": "loss", "clip": "x"}'):
        save_file({"gamma": torch.ones(2)}, path, {"llm_wsae": header})
        with pytest.raises(LlmWsaeError, match="does not say how its weights were made"):
            LossWeights.load(path)
