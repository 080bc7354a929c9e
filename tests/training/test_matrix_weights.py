"""Weights that act as a space to train in, folded back at the end; and weights that are annealed.
A matrix in the loss is in the tests of every architecture's step."""

from dataclasses import replace

import pytest
import torch
from looping import over
from training_cases import CONFIG, CPU, Planted, error, fvu

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.training.architecture import squared
from llm_wsae.training.arm import Arm, ArmConfig, make_arms
from llm_wsae.training.normaliser import folded
from llm_wsae.training.trainer import Training, train
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import LossWeights, weights_from_rule
from llm_wsae.weights.rules import RuleInputs

WIDTH = 16
SPACE = WeightConfig(place="space")
SHORT = replace(CONFIG, tokens=256 * 60, log_every=20, learning_rate=None)


@pytest.fixture(scope="module")
def source():
    return Planted(6000, massive=True)


@pytest.fixture(scope="module")
def inputs(source):
    half = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5))
    return RuleInputs(source.statistics(), fisher=(half @ half.T).double())


@over(seed=range(5), diagonal=(True, False), threshold=(True, False))
def test_folding_back_changes_nothing(source, seed, diagonal, threshold):
    """For any parameters and any Γ that stretches by 0.03 to 30 (float32 has 7 digits to lose): the
    same codes (in units of x), and Γ(x̂ − μ)/scale is the reconstruction in the space."""
    generator = torch.Generator().manual_seed(seed)
    gamma = 10 ** (3 * torch.rand(WIDTH, generator=generator) - 1.5)
    if not diagonal:
        turn, other = torch.linalg.qr(torch.randn(2, WIDTH, WIDTH, generator=generator)).Q
        gamma = turn @ gamma.diag() @ other
    arm = Arm(ArmConfig(LossWeights(gamma, config=SPACE), k=4, init_seed=1), WIDTH, 32, CPU)
    for parameter in arm.parameters:
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    limit = torch.rand(32, generator=generator) if threshold else None
    normaliser = source.normaliser()
    scale, mean = normaliser.scale, normaliser.mean
    tensors = folded(arm.parameters, mean, scale, limit, gamma)

    rows = source.rows[1:200]
    batch = arm.space.enter(normaliser.batch(rows))
    there = batch.x @ arm.parameters.encoder.T + arm.parameters.encoder_bias
    here = rows @ tensors["W_enc"] + tensors["b_enc"]
    torch.testing.assert_close(here, scale * there, rtol=1e-3, atol=1e-3 * float(there.abs().max()))
    if threshold:
        torch.testing.assert_close(tensors["threshold"], scale * limit)
    codes = there.relu()
    in_space = codes @ arm.parameters.decoder + arm.parameters.decoder_bias
    back = (scale * codes) @ tensors["W_dec"] + tensors["b_dec"]
    assert error(arm.space.leave(in_space) * scale + mean, back) < 1e-4
    assert error(arm.space.leave(batch.x), normaliser.batch(rows).x) < 1e-4


def test_arms_that_share_a_space_share_the_product(source, inputs, tmp_path):
    weights = [weights_from_rule("sensitivity", alpha, inputs, SPACE) for alpha in (0.25, 0.5)]
    training = Training(source, make_arms(weights, [2, 4]), SHORT, tmp_path, CPU)
    spaces = [arm.space for arm in training.arms]
    assert spaces[0] is spaces[1] is not spaces[2] is spaces[3]
    batch = source.normaliser(torch.bfloat16).batch(source.rows[:600])
    entered = spaces[2].enter(batch)
    torch.testing.assert_close(entered.x, batch.x @ weights[1].gamma.T)
    assert entered.x_fast.dtype == torch.bfloat16
    assert int((batch.mask == 0).sum()) == 2 and not entered.x[batch.mask == 0].any()


def test_every_architecture_trains_in_a_space(source, inputs, tmp_path):
    """The saved dictionary has the FVU that was logged, which is that of x and not of Γx. It
    remembers its weights."""
    settings = WeightConfig(place="space", clip=8.0, draw=1)
    weights = [
        weights_from_rule("rotated:sensitivity", 0.25, inputs, settings),
        weights_from_rule("variance", -0.5, inputs, SPACE),
    ]
    names = ("topk", "batch-topk", "matryoshka", "jumprelu")
    arms = make_arms(weights, [4], [0.02], architectures=names)
    rows = source.rows[source.rows.norm(dim=1) < 500]
    for name, dictionary in train(source, arms, SHORT, tmp_path / "out").items():
        found = fvu(dictionary, rows)
        assert found == pytest.approx(dictionary.info.metrics["training"]["fvu"], rel=0.25), name
        assert found < 0.6, name
        norms = dictionary.W_dec.norm(dim=1)
        assert float(norms.max() / norms.min()) > 1.05  # of norm 1 in the space only
    name = "rotated-sensitivity-a0.25-c8-space-d1-jumprelu-k4"
    dictionary = Dictionary.load(tmp_path / "out" / name)
    assert torch.equal(dictionary.extras["gamma"], weights[0].gamma)
    assert dictionary.info.rule == "rotated:sensitivity" and dictionary.info.alpha == 0.25
    assert WeightConfig(**dictionary.info.weights) == settings


@over(form=("diagonal", "matrix"))
def test_annealing_ends_at_one(source, inputs, form):
    weights = weights_from_rule("sensitivity", 0.5, inputs, WeightConfig(anneal=0.5, form=form))
    arm = Arm(ArmConfig(weights, k=4), WIDTH, 32, CPU)
    one = torch.ones(WIDTH) if form == "diagonal" else torch.eye(WIDTH)
    variance = source.statistics().robust_covariance
    for done, left in ((0.0, 1.0), (0.125, 0.75), (0.3, 0.4), (0.5, 0.0), (1.0, 0.0)):
        arm.anneal(done)
        torch.testing.assert_close(arm.gamma, left * weights.gamma + (1 - left) * one)
        assert torch.equal(arm.metric, squared(arm.gamma))
        gamma = arm.gamma.double()
        gamma = gamma.diag() if form == "diagonal" else gamma
        share = float((gamma @ variance @ gamma.T).trace() / variance.trace())
        assert 0.5 < share < 1.01  # no more than the plain loss has, and not much less
    assert torch.equal(arm.gamma, one)


def test_an_annealed_training_is_neither_of_its_ends(source, inputs, tmp_path):
    weights = [
        weights_from_rule("variance", 0.5, inputs, config)
        for config in (WeightConfig(), WeightConfig(anneal=0.5))
    ]
    weights.append(weights_from_rule("uniform", 1.0, inputs))
    always, annealed, plain = train(source, make_arms(weights, [4]), SHORT, tmp_path).values()
    assert annealed.info.name == "variance-a0.5-n0.5-k4"
    for other in (always, plain):
        assert not torch.allclose(annealed.W_dec, other.W_dec, atol=1e-3)
