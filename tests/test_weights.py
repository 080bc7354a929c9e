import pytest
import torch
from safetensors.torch import save_file

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.statistics.moments import Statistics
from llm_wsae.statistics.monosemanticity import RULES
from llm_wsae.statistics.weights import (
    LossWeights,
    collapse_warning,
    effective_dimensions,
    own_weights,
    weights_from_rule,
)

SCALE = torch.tensor([0.5, 1.0, 2.0, 4.0])


@pytest.fixture(scope="module")
def statistics():
    x = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)) * SCALE
    return Statistics(4, 16).update(x, torch.arange(len(x)) % 16)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [-1.0, -0.25, 0.0, 0.5, 1.0, 2.0])
def test_every_rule_is_normalised(rule, alpha, statistics):
    weights = weights_from_rule(rule, alpha, statistics)
    var = statistics.robust_variance
    assert weights.gamma.dtype == torch.float32
    assert float((weights.gamma**2 * var).sum()) == pytest.approx(float(var.sum()), rel=1e-6)


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
    save_file({"gamma": torch.ones(2, 2)}, path)
    with pytest.raises(LlmWsaeError, match="one floating-point number per dimension"):
        LossWeights.load(path)
