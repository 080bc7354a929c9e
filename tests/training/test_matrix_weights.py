"""A matrix Γ: as a space to train in, folded back at the end, and in the loss."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.architectures import find_architecture
from llm_wsae.training.architectures.topk import TopK
from llm_wsae.training.arm import Arm, ArmConfig, make_arms
from llm_wsae.training.auxk import DeadLatents, auxk_gradients
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.export import folded
from llm_wsae.training.normaliser import Normaliser, Spaces, in_spaces
from llm_wsae.training.parameters import (
    Batch,
    Parameters,
    initial_parameters,
    squared,
    weighted_error,
)
from llm_wsae.training.trainer import train
from llm_wsae.weights.choosing import own_weights, weights_from_rule
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.loss_weights import LossWeights

D_IN, ROWS = 16, 6000
CPU = torch.device("cpu")
SPACE = WeightConfig(place="space")


class Rows:
    """Rows of a mixture, in memory, as an ActivationSource."""

    d_in = D_IN
    site = Site(0, "post")
    num_rows = ROWS

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(40, D_IN, generator=generator)
        active = torch.rand(ROWS, 40, generator=generator) > 0.9
        self.rows = (active * torch.rand(ROWS, 40, generator=generator)) @ features + 2
        self.rows[::500] *= 1000  # massive

    def batches(self, batch_size, seed, start=0):
        number = start
        while True:
            generator = torch.Generator().manual_seed(1000 * seed + number)
            yield self.rows[torch.randint(ROWS, (batch_size,), generator=generator)]
            number += 1

    def statistics(self):
        return Statistics(D_IN, 500).update(self.rows, torch.arange(ROWS) % 500)

    def identity(self):
        return {"kind": "test"}


@pytest.fixture(scope="module")
def source():
    return Rows()


@pytest.fixture(scope="module")
def inputs(source):
    half = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(5))
    return RuleInputs(source.statistics(), fisher=(half @ half.T).double())


CONFIG = TrainConfig(
    expansion=4, tokens=256 * 60, batch_size=256, device="cpu", dtype="float32", log_every=20
)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.booleans())
def test_folding_back_changes_nothing(source, seed, diagonal, threshold):
    """For any parameters and any Γ that stretches by 0.03 to 30 (float32 has 7 digits to lose): the
    same codes (in units of x), and Γ(x̂ − μ)/scale is the reconstruction in the space."""
    generator = torch.Generator().manual_seed(seed)
    gamma = 10 ** (3 * torch.rand(D_IN, generator=generator) - 1.5)
    if not diagonal:
        turn, other = torch.linalg.qr(torch.randn(2, D_IN, D_IN, generator=generator)).Q
        gamma = turn @ gamma.diag() @ other
    arm = Arm(ArmConfig(LossWeights(gamma, config=SPACE), k=4, init_seed=1), D_IN, 32, CPU)
    for parameter in arm.parameters:
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    limit = torch.rand(32, generator=generator) if threshold else None
    normaliser = Normaliser(source.statistics(), CPU, torch.float32)
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
    error = arm.space.leave(in_space) * scale + mean - back
    assert float(error.norm() / back.norm()) < 1e-4
    torch.testing.assert_close(
        arm.space.leave(batch.x), normaliser.batch(rows).x, rtol=1e-3, atol=1e-4
    )


def test_a_row_that_is_not_finite_is_masked_like_a_massive_one(source):
    normaliser = Normaliser(source.statistics(), CPU, torch.float32)
    rows = source.rows[:4].clone()
    rows[1, 2], rows[2, 0] = float("inf"), float("nan")
    batch = normaliser.batch(rows)
    assert batch.mask.tolist()[1:3] == [0, 0] and not batch.x[1:3].any()
    assert torch.equal(batch.x[3], normaliser.batch(source.rows[3:4]).x[0])


def test_arms_that_share_a_space_share_the_product(source, inputs, monkeypatch):
    weights = [
        weights_from_rule("uniform", 1.0, inputs),
        weights_from_rule("sensitivity", 0.25, inputs, SPACE),
        weights_from_rule("sensitivity", 0.25, inputs, SPACE),
        weights_from_rule("sensitivity", 0.5, inputs, SPACE),
    ]
    spaces = Spaces(CPU)
    found = [spaces.of(w) for w in weights]
    assert found[0] is None and found[1] is found[2] is not found[3]
    batch = Normaliser(source.statistics(), CPU, torch.bfloat16).batch(source.rows[:600])
    batches = list(in_spaces(batch, found))
    assert batches[0] is batch and batches[1] is batches[2]
    torch.testing.assert_close(batches[3].x, batch.x @ weights[3].gamma.T)
    assert batches[3].x_fast.dtype == torch.bfloat16
    assert int((batch.mask == 0).sum()) == 2 and bool((batches[3].x[batch.mask == 0] == 0).all())


def test_the_identity_is_the_plain_training(source, inputs, tmp_path):
    """Γ = 1 as a space, as a matrix in the loss, and plain: the same at the same rate."""
    eye = torch.eye(D_IN)
    chosen = {
        "plain": weights_from_rule("uniform", 1.0, inputs),
        "space": LossWeights(eye, config=SPACE),
        "loss": LossWeights(eye),
    }
    trained, config = {}, replace(CONFIG, learning_rate=4e-3)
    for name, weights in chosen.items():
        (trained[name],) = train(
            source, make_arms([weights], [4]), config, tmp_path / name
        ).values()
    for name, parameter in trained["plain"].named_parameters():
        assert torch.equal(parameter, getattr(trained["space"], name)), name
        torch.testing.assert_close(parameter, getattr(trained["loss"], name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["topk", "batch-topk", "matryoshka", "jumprelu", "relu"])
def test_every_architecture_trains_in_a_space(architecture, source, inputs, tmp_path):
    """The saved dictionary has the FVU that was logged, which is that of x and not of Γx."""
    weights = [
        weights_from_rule("sensitivity", 0.25, inputs, SPACE),
        weights_from_rule("variance", -0.5, inputs, SPACE),
    ]
    if architecture == "relu":
        arms = make_arms(weights, [], [0.02])
    else:
        arms = make_arms(weights, [4], architectures=[architecture])
    for dictionary in train(source, arms, CONFIG, tmp_path / "out").values():
        rows = source.rows[source.rows.norm(dim=1) < 500]
        error = (dictionary(rows) - rows).square().sum()
        fvu = float(error / (rows - rows.mean(0)).square().sum())
        assert fvu == pytest.approx(dictionary.info.metrics["training"]["fvu"], rel=0.25)
        assert fvu < 0.6
        norms = dictionary.W_dec.norm(dim=1)
        assert float(norms.max() / norms.min()) > 1.05  # of norm 1 in the space only


def test_what_a_dictionary_remembers(source, inputs, tmp_path):
    config = WeightConfig(place="space", clip=8.0, draw=1)
    weights = weights_from_rule("rotated:sensitivity", 0.25, inputs, config)
    name = "rotated-sensitivity-a0.25-c8-space-d1-k4"
    train(source, make_arms([weights], [4]), CONFIG, tmp_path / "out")
    dictionary = Dictionary.load(tmp_path / "out" / name)
    assert torch.equal(dictionary.extras["gamma"], weights.gamma)
    assert dictionary.info.rule == "rotated:sensitivity" and dictionary.info.alpha == 0.25
    assert WeightConfig(**dictionary.info.weights) == config


def test_a_training_in_another_space_is_not_gone_on_with(source, inputs, tmp_path):
    eye = torch.eye(D_IN)
    train(source, make_arms([LossWeights(eye, config=SPACE)], [4]), CONFIG, tmp_path / "out")
    with pytest.raises(LlmWsaeError, match="other settings"):
        train(source, make_arms([LossWeights(eye)], [4]), CONFIG, tmp_path / "out")


@pytest.mark.parametrize("form", ["diagonal", "matrix"])
def test_annealing_ends_at_one(form, source, inputs):
    config = WeightConfig(anneal=0.5, form=form)
    weights = weights_from_rule("sensitivity", 0.5, inputs, config)
    arm = Arm(ArmConfig(weights, k=4), D_IN, 32, CPU)
    one = torch.ones(D_IN) if form == "diagonal" else torch.eye(D_IN)
    arm.anneal(0.0)
    assert torch.equal(arm.gamma, weights.gamma)
    first = arm.metric
    arm.anneal(0.125)
    torch.testing.assert_close(arm.gamma, 0.75 * weights.gamma + 0.25 * one)
    for done in (0.5, 0.75, 1.0):
        arm.anneal(done)
        assert torch.equal(arm.gamma, one)
    variance = source.statistics().robust_covariance
    for done in (0.1, 0.3):  # no more than the plain loss has, and not much less
        arm.anneal(done)
        gamma = arm.gamma.double()
        gamma = gamma.diag() if form == "diagonal" else gamma
        assert torch.equal(arm.metric, squared(arm.gamma)) and not torch.equal(arm.metric, first)
        share = float((gamma @ variance @ gamma.T).trace() / variance.trace())
        assert 0.5 < share < 1.01


def test_an_annealed_training_is_neither_of_its_ends(source, inputs, tmp_path):
    arms = [
        *make_arms([weights_from_rule("variance", 0.5, inputs)], [4]),
        *make_arms([weights_from_rule("variance", 0.5, inputs, WeightConfig(anneal=0.5))], [4]),
        *make_arms([weights_from_rule("uniform", 1.0, inputs)], [4]),
    ]
    always, annealed, plain = train(source, arms, CONFIG, tmp_path / "out").values()
    assert annealed.info.name == "variance-a0.5-n0.5-k4"
    assert not torch.allclose(annealed.W_dec, always.W_dec, atol=1e-3)
    assert not torch.allclose(annealed.W_dec, plain.W_dec, atol=1e-3)


class Squares(TorchDispatchMode):
    """Counts products of two matrices of D_IN × D_IN."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = [tuple(one.shape) for one in args if isinstance(one, torch.Tensor)]
        self.count += func is torch.ops.aten.mm.default and shapes == [(D_IN, D_IN)] * 2
        return func(*args, **(kwargs or {}))


def test_a_matrix_is_squared_once(source):
    matrix = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(1))
    for anneal, expected in ((0.0, 1), (0.5, 4)):
        with Squares() as squares:
            weights = LossWeights(matrix, config=WeightConfig(anneal=anneal))
            arm = Arm(ArmConfig(weights, k=4), D_IN, 3 * D_IN, CPU)
            normaliser = Normaliser(source.statistics(), CPU, torch.float32)
            batches = itertools.islice(source.batches(5 * D_IN, 0), 3)
            for step, rows in enumerate(batches):
                arm.anneal(step / 10)
                arm.last_fired -= 10_000  # all are dead, so that AuxK has work to do
                arm.step(normaliser.batch(rows), step + 1, 1e-3, 1 / 32, 100)
        assert squares.count == expected, anneal


def test_own_matrix_that_is_no_space(inputs):
    nearly = torch.eye(D_IN)
    nearly[0, 0] = 1e-7
    with pytest.raises(LlmWsaeError, match="more than 100,000 times"):
        own_weights(LossWeights(nearly, config=SPACE), inputs)


LOSS_D_IN, LOSS_D_SAE, LOSS_BATCH, LOSS_K = 12, 40, 300, 4
STEPS = (
    *("topk", "batch-topk", "matryoshka", "jumprelu"),
    *("relu, dense", "relu, sparse", "gba, dense", "gba, sparse"),
)


def step_of(name, parameters, batch, gamma):
    metric = squared(gamma)
    kind = find_architecture(name.split(",")[0])
    made = kind(0.01 if kind.setting == "l1" else LOSS_K, LOSS_D_SAE)
    if name == "jumprelu":
        made.log_threshold = torch.full((LOSS_D_SAE,), -1.0).to(parameters.decoder)
    if name.endswith(", sparse"):
        return made.sparse_step(parameters, batch, metric)
    return made.step(parameters, batch, metric)


def problem(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = initial_parameters(LOSS_D_IN, LOSS_D_SAE, seed, torch.device("cpu"), torch.float64)
    noise = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in start]
    parameters = Parameters(*((p + 0.05 * n).to(dtype) for p, n in zip(start, noise, strict=True)))
    x = torch.randn(LOSS_BATCH, LOSS_D_IN, generator=generator, dtype=torch.float64)
    mask = (torch.rand(LOSS_BATCH, generator=generator) > 0.1).to(dtype)
    x = x.to(dtype) * mask[:, None]
    gamma = torch.rand(LOSS_D_IN, generator=generator, dtype=torch.float64).to(dtype) * 2
    matrix = torch.randn(LOSS_D_IN, LOSS_D_IN, generator=generator, dtype=torch.float64).to(dtype)
    return parameters, Batch(x, x, mask), gamma, matrix


def distance(found, expected):
    return max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", STEPS)
def test_a_diagonal_matrix_is_its_diagonal(name):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        parameters, batch, gamma, _ = problem(dtype)
        by_vector = step_of(name, parameters, batch, gamma)
        by_matrix = step_of(name, parameters, batch, gamma.diag())
        assert distance(by_matrix.gradients, by_vector.gradients) < tolerance
        assert float(by_matrix.loss) == pytest.approx(float(by_vector.loss), rel=tolerance)
        assert torch.equal(by_matrix.firings, by_vector.firings)


def test_the_error_and_its_gradient():
    _, batch, _, matrix = problem(torch.float64)
    residual = (batch.x * 0.3).requires_grad_()
    loss, gradient = weighted_error(residual.detach(), batch.mask, squared(matrix), batch.num_rows)
    expected = (residual @ matrix.T).square().sum() / (batch.mask.sum() * LOSS_D_IN)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, residual)[0])


def test_topk_gradients_equal_autograd():
    parameters, batch, _, matrix = problem(torch.float64)
    found = TopK(LOSS_K, LOSS_D_SAE).step(parameters, batch, squared(matrix))
    leaves = Parameters(*(p.clone().requires_grad_() for p in parameters))
    pre = batch.x @ leaves.encoder.T + leaves.encoder_bias
    top = pre.topk(LOSS_K, dim=1)
    codes = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    error = (codes @ leaves.decoder + leaves.decoder_bias - batch.x) * batch.mask[:, None]
    loss = (error @ matrix.T).square().sum() / (batch.mask.sum() * LOSS_D_IN)
    assert float(found.loss) == pytest.approx(float(loss.detach()), rel=1e-12)
    assert distance(found.gradients, torch.autograd.grad(loss, leaves)) < 1e-12


def test_auxk_uses_the_same_metric():
    parameters, batch, gamma, matrix = problem(torch.float64)
    residual = TopK(LOSS_K, LOSS_D_SAE).step(parameters, batch, squared(matrix)).residual
    dead = torch.tensor([3, 5, 8])
    found = DeadLatents(dead)
    gradients = [
        auxk_gradients(parameters, batch, residual, found, squared(weights), 0.5)
        for weights in (gamma, gamma.diag(), matrix)
    ]
    assert all(torch.equal(one.latents, dead) for one in gradients)
    assert distance(gradients[1][1:], gradients[0][1:]) < 1e-12
    leaves = [parameter[dead].clone().requires_grad_() for parameter in parameters[:3]]
    encoder, decoder, bias = leaves
    error = ((batch.x @ encoder.T + bias).relu() @ decoder + residual) * batch.mask[:, None]
    metric = squared(matrix)
    loss = ((error @ metric) * error).sum() / ((residual @ metric) * residual).sum()
    assert distance(gradients[2][1:], torch.autograd.grad(0.5 * loss, leaves)) < 1e-12
