"""The step of every architecture through the same tests, and what is each one's own."""

from itertools import pairwise

import pytest
import torch
import training_cases as cases
from looping import over
from sparse_cases import dense
from torch import Tensor
from training_cases import CPU, D_IN, D_SAE, STEPS, TOLERANCE, K, error, problem, step_of

from llm_wsae.sparse.codes import SlotCapacity, ragged
from llm_wsae.sparse.operations import encode_topk
from llm_wsae.training.architecture import Batch, Parameters
from llm_wsae.training.architectures import jumprelu
from llm_wsae.training.architectures.batch_topk import BatchTopK
from llm_wsae.training.architectures.gba import EVERY, GBA, RATE, STEPS_EACH, target_frequencies
from llm_wsae.training.architectures.jumprelu import JumpReLU
from llm_wsae.training.architectures.matryoshka import group_bounds
from llm_wsae.training.arm import Arm, ArmConfig, initial_parameters
from llm_wsae.weights.loss_weights import LossWeights

GROUPS = [(0, 8), (8, 24), (24, 56), (56, 120), (120, 256)]


class Jump(torch.autograd.Function):
    """slope·[z > θ], with the paper's pseudo-gradient by θ, −slope(θ)/ε in the window: z·[z > θ] if
    ``pre`` is z, with its true gradient by z; [z > θ] if it is 1."""

    @staticmethod
    def forward(ctx, pre, threshold, slope, active, window):
        ctx.save_for_backward(slope, active, window)
        return pre * active

    @staticmethod
    def backward(ctx, gradient):
        slope, active, window = ctx.saved_tensors
        by_threshold = (-slope / jumprelu.BANDWIDTH * window * gradient).sum(0)
        return gradient * active, by_threshold, None, None, None


def values_of(parameters: Parameters, batch: Batch, name: str, k: int) -> Tensor:
    """The latents that the step itself encodes, [batch, d_sae]: which are active is not
    differentiable. For JumpReLU all that are positive."""
    bound = torch.zeros_like(parameters.encoder_bias)
    if name.startswith("gba"):
        bound = cases.architecture(name, batch.x).thresholds()
    if name.endswith(", dense"):  # in the step's tiles: another shape may round otherwise
        pre = torch.cat([tile.pre() for tile in batch.product(parameters).tiles(1024)])
        return (pre * (pre > bound)).double() * batch.mask.double()[:, None]
    if name == "topk":
        codes = batch.exact(ragged(encode_topk(batch.product(parameters), k)), parameters)
    elif name in ("batch-topk", "matryoshka"):
        codes = batch.exact(BatchTopK(k, D_SAE).codes(parameters, batch), parameters)
    else:
        codes = batch.above(bound, parameters, SlotCapacity())
    return dense(codes, codes.values.double(), D_SAE) * batch.mask.double()[:, None]


def autograd(
    parameters: Parameters, batch: Batch, gamma: Tensor, name: str, k: int
) -> tuple[Tensor, Parameters, Tensor, Tensor, Tensor | None]:
    """Loss, gradients, residual, firings and log θ's gradient, dense and in float64."""
    leaves = Parameters(*(p.double().clone().requires_grad_() for p in parameters))
    x, mask, gamma = batch.x.double(), batch.mask.double(), gamma.double()
    gamma = gamma.diag() if gamma.ndim == 1 else gamma
    rows, pre = mask.sum(), x @ leaves.encoder.T + leaves.encoder_bias
    z, log, penalty = values_of(parameters, batch, name, k), None, 0.0
    active = (z > 0).double()
    if name == "jumprelu":
        log = cases.architecture(name, batch.x).log_threshold.double().requires_grad_()
        threshold = log.exp()
        active = (z > threshold.float().to(batch.x.dtype)).double()
        window = ((z - threshold).abs() < jumprelu.BANDWIDTH / 2).double() * (z > 0)
        latents = Jump.apply(pre, threshold, threshold.detach(), active, window)
        ones = torch.ones_like(pre)
        l0 = Jump.apply(ones, threshold, torch.ones_like(threshold), active, window).sum() / rows
        penalty = jumprelu.COEFFICIENT * (l0 / k - 1) ** 2
    else:
        latents = pre * active
        if name.startswith("relu"):
            penalty = cases.L1 * latents.sum() / rows
    loss = penalty
    for _, stop in GROUPS if name == "matryoshka" else [(0, D_SAE)]:
        prefix = latents[:, :stop] @ leaves.decoder[:stop] + leaves.decoder_bias
        residual = (prefix - x) * mask[:, None]
        loss = loss + ((residual @ gamma.T) ** 2).sum() / (rows * D_IN)
    loss.backward()
    gradients = Parameters(*(p.grad for p in leaves))
    by_log = None if log is None else log.grad
    return loss.detach(), gradients, residual.detach(), active.sum(0), by_log


def check_gradients(name: str, dtype: torch.dtype, k: int = K, matrix: bool = False) -> None:
    parameters, batch, gamma = problem(dtype, matrix)
    step, tolerance = step_of(name, parameters, batch, gamma, k), TOLERANCE[dtype]
    loss, gradients, residual, firings, by_log = autograd(parameters, batch, gamma, name, k)
    found = (*cases.gradients_of(step), step.residual)
    assert cases.largest_error(found, (*gradients, residual)) < tolerance
    assert float(step.loss) == pytest.approx(float(loss), rel=tolerance)
    assert torch.equal(step.firings.double(), firings)
    assert (batch.mask == 0).sum() > 50 and firings.min() < 0.7 * firings.max()
    if name == "jumprelu":
        assert error(step.observed, by_log) < tolerance
        assert (by_log != 0).sum() > 0.9 * D_SAE


@pytest.mark.parametrize("name", STEPS)
def test_gradients_are_those_of_dense_autograd(name):
    for dtype in TOLERANCE:
        check_gradients(name, dtype)
    check_gradients(name, torch.float64, matrix=True)


@over(name=["topk", "batch-topk", "matryoshka"], k=(1, D_SAE))
def test_gradients_with_one_latent_and_with_all(name, k):
    check_gradients(name, torch.float32, k)


@over(name=STEPS)
def test_a_batch_of_masked_rows_has_no_part(name):
    parameters, batch, gamma = problem(torch.float64)
    nothing = Batch(batch.x * 0, batch.x_fast * 0, batch.mask * 0)
    step = step_of(name, parameters, nothing, gamma)
    assert not any(part.any() for part in (*cases.gradients_of(step), step.firings, step.residual))
    assert torch.isfinite(step.loss)
    assert name == "jumprelu" or step.observed is None or not step.observed.any()


# --- What is each architecture's own


@over(name=["batch-topk", "matryoshka"])
def test_the_threshold_lets_in_k_latents_a_row(name):
    """In float32, as a finished dictionary encodes, though bfloat16 picked them."""
    parameters, batch, gamma = problem(torch.bfloat16)
    threshold = step_of(name, parameters, batch, gamma).observed
    kept = batch.mask > 0
    pre = batch.x[kept] @ parameters.encoder.T + parameters.encoder_bias
    assert float((pre > threshold).sum() / kept.sum()) == pytest.approx(K, rel=0.01)


def test_the_running_threshold_is_a_mean_over_the_last_tenth_of_the_steps():
    made, expected = BatchTopK(K, 3), 0.0
    for step in range(80):
        expected += 10 / (step + 10) * (step + 1 - expected)
        made.follow(torch.tensor(step + 1.0), 0.1)
    assert 80 * 0.85 < expected < 80
    assert made.thresholds().tolist() == pytest.approx([expected] * 3)
    for smallest in [5.0] * 2000 + [6.0]:
        made.follow(torch.tensor(smallest), 0.1)
    assert float(made.running_threshold) == pytest.approx(5 + 1 / 100)


def test_groups_of_latents():
    assert group_bounds(D_SAE) == GROUPS
    assert group_bounds(24576)[0] == (0, 768) and group_bounds(24576)[-1] == (11520, 24576)
    assert group_bounds(2) == [(0, 1), (1, 2)] and group_bounds(1) == [(0, 1)]


def test_learnt_thresholds_start_where_k_latents_are_active_and_follow_adam():
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    made = JumpReLU(16, 512)
    pre = x @ initial_parameters(64, 512, 0, CPU).encoder.T
    assert float((pre > made.thresholds()).sum(1).float().mean()) == pytest.approx(16, rel=0.05)
    assert jumprelu.initial_threshold(512, 512) == jumprelu.BANDWIDTH / 2

    before = made.log_threshold.clone()
    for _ in range(5):  # of which Adam makes steps of the learning rate
        made.follow(x[0].repeat(8), 0.01)
    moved = before - 0.05 * jumprelu.THRESHOLD_RATE_MULTIPLIER * x[0].repeat(8).sign()
    torch.testing.assert_close(made.log_threshold, moved)


# --- Group bias adaptation: the tied step, the adaptation of thresholds, and their targets


@over(name=("gba, dense", "gba, sparse"))
def test_gradients_through_the_tie_are_those_of_autograd(name):
    """The paper's model in its own terms: tied, thresholds on the reading of a unit row. Where
    weights give decoder rows another length than 1, that counts as fixed."""
    parameters, batch, gamma = problem(torch.float64)
    made, x, mask = cases.architecture(name, batch.x), batch.x, batch.mask
    made.tie(parameters)
    step = step_of(name, parameters, batch, gamma, made=made)
    step = made.through_tie(step, parameters)
    learnt = (parameters.decoder, parameters.decoder_bias, made.amplitude)
    w, b_dec, a = (part.clone().requires_grad_() for part in learnt)
    length = w.norm(dim=1).detach()
    reading = (x - b_dec) @ (w / length[:, None]).T
    active = (reading > made.threshold * length).double() * mask[:, None]
    missed = ((reading * active * a / length) @ w + b_dec - x) * gamma * mask[:, None]
    (missed.square().sum() / (mask.sum() * D_IN)).backward()
    assert torch.equal(step.firings, active.sum(0))
    assert 0.02 < float(active.mean()) < 0.4
    found = (cases.gradients_of(step).decoder, step.by_decoder_bias, step.observed[:, 2])
    for one, leaf in zip(found, (w, b_dec, a), strict=True):
        assert error(one, leaf.grad) < 1e-12
    torch.testing.assert_close(step.observed[:, 0], active.sum(0) / mask.sum())
    highest = ((reading / length - made.threshold) * active).amax(0)
    torch.testing.assert_close(step.observed[:, 1], highest, rtol=1e-10, atol=1e-12)


def test_the_rounded_encoder_follows_the_tie():
    _, batch, gamma = problem(torch.bfloat16)
    arm = Arm(ArmConfig(LossWeights(gamma), K, architecture="gba"), D_IN, D_SAE, CPU)
    for number in (1, 2):
        arm.step(batch, number * len(batch.x), 1e-3, 0.0, 10**9)
    encoder, decoder, bias, decoder_bias = arm.parameters
    torch.testing.assert_close(encoder, decoder * arm.architecture.amplitude[:, None])
    torch.testing.assert_close(bias, -encoder @ decoder_bias)
    assert torch.equal(arm._optimiser.encoder(torch.bfloat16), encoder.bfloat16())


def follow(made, frequency, excess):
    made.follow(torch.stack([frequency, excess, torch.zeros_like(excess)], dim=1), 1e-3)


def test_a_latent_above_its_target_rises_and_one_that_never_fired_falls():
    made = GBA(3, 30)
    made.threshold.fill_(0.5)
    made.threshold[12] = 0.001
    frequency, excess = torch.zeros(30), torch.zeros(30)
    frequency[:10], excess[:10] = 0.9, torch.arange(10.0)  # one of every group; the first has r = 0
    frequency[[10, 11]], excess[[10, 11]] = 1e-5, 3.0  # below every target
    follow(made, frequency, excess)
    expected = torch.full((30,), 0.5)
    expected[:10] += RATE * excess[:10]
    group = torch.tensor([3.0, (1 + 3) / 2, *range(2, 10)])  # means over the positive r
    expected[12:] -= RATE * group[torch.arange(12, 30) % 10]
    expected[12] = 0  # not below
    torch.testing.assert_close(made.threshold, expected)
    made.threshold.fill_(100.0)  # not above the length of rows
    made.tie(Parameters(torch.ones(30, 4), torch.ones(30, 4), torch.ones(30), torch.ones(4)))
    assert made.threshold.tolist() == [2.0] * 30


def test_adaptations_become_rarer():
    made = GBA(3, 30)
    at, before = [], made.threshold.clone()
    for step in range(1, 12_000):
        follow(made, torch.full((30,), float(step % 2)), torch.ones(30))
        if not torch.equal(made.threshold, before):
            at.append(step)
        before = made.threshold.clone()
    gaps = [b - a for a, b in pairwise(at)]
    assert gaps[:100] == [1] * 100 and set(gaps) == set(range(1, EVERY + 1))
    assert at[gaps.index(EVERY)] == pytest.approx(STEPS_EACH * (EVERY - 1), abs=EVERY)


@over(d_sae=(4, 10, 64, 4608))
def test_targets_fall_geometrically_and_sum_to_k(d_sae):
    targets = target_frequencies(2, d_sae).double()
    assert float(targets[torch.arange(d_sae) % 10].sum()) == pytest.approx(2, rel=1e-5)
    ratios = targets[1:] / targets[:-1]
    torch.testing.assert_close(ratios, torch.full((9,), 100 ** (-1 / 9)).double())
