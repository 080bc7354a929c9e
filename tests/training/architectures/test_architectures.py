"""The step of every architecture through the same tests, and what is each one's own."""

import pytest
import torch
from sparse_cases import dense
from torch import Tensor
from training_cases import (
    CPU,
    D_IN,
    D_SAE,
    L1,
    STEPS,
    TOLERANCE,
    K,
    architecture,
    error,
    log_threshold,
    problem,
    step_of,
)

from llm_wsae.sparse.codes import EPSILON, ragged
from llm_wsae.sparse.operations import encode_above, encode_topk
from llm_wsae.training.architecture import Batch, Parameters, exact
from llm_wsae.training.architectures.batch_topk import BatchTopK
from llm_wsae.training.architectures.jumprelu import (
    BANDWIDTH,
    COEFFICIENT,
    THRESHOLD_RATE_MULTIPLIER,
    JumpReLU,
    initial_threshold,
)
from llm_wsae.training.architectures.matryoshka import group_bounds
from llm_wsae.training.optimiser import initial_parameters

GROUPS = [(0, 8), (8, 24), (24, 56), (56, 120), (120, 256)]


class Near(torch.autograd.Function):
    """[z > θ] with the pseudo-gradient by θ: −1/ε in the window, the paper's ∂H."""

    @staticmethod
    def forward(ctx, threshold, active, window):
        ctx.save_for_backward(window)
        return active

    @staticmethod
    def backward(ctx, gradient):
        (window,) = ctx.saved_tensors
        return (-window / BANDWIDTH * gradient).sum(0), None, None


class Jump(torch.autograd.Function):
    """z·[z > θ] with the pseudo-gradient by θ: −θ/ε in the window; by z the true one."""

    @staticmethod
    def forward(ctx, pre, threshold, active, window):
        ctx.save_for_backward(threshold, active, window)
        return pre * active

    @staticmethod
    def backward(ctx, gradient):
        threshold, active, window = ctx.saved_tensors
        by_threshold = (-threshold / BANDWIDTH * window * gradient).sum(0)
        return gradient * active, by_threshold, None, None


def codes_of(parameters: Parameters, batch: Batch, name: str, k: int) -> Tensor:
    """1 where a latent is active, by the operations that the step itself encodes with."""
    fast = batch.x_fast.dtype
    inputs = (batch.x_fast, parameters.encoder.to(fast), parameters.encoder_bias.to(fast))
    threshold = torch.zeros_like(parameters.encoder_bias)
    if name.startswith("gba"):
        threshold = architecture(name, batch.x).thresholds()
    if name.endswith(", dense"):  # in the step's tiles: another shape may round otherwise
        tiles = [torch.addmm(inputs[2], rows, inputs[1].T) for rows in inputs[0].split(1024)]
        return (torch.cat(tiles) > threshold).double() * batch.mask.double()[:, None]
    if name == "topk":
        codes = ragged(encode_topk(*inputs, k))
    elif name.endswith(", sparse"):
        codes = encode_above(*inputs, threshold)
    else:
        codes = BatchTopK(k, D_SAE).codes(parameters, batch)
    codes = exact(codes, parameters, batch)
    chosen = dense(codes, (codes.values > 0).double(), D_SAE)
    return chosen * batch.mask.double()[:, None]


def autograd(parameters: Parameters, batch: Batch, gamma: Tensor, name: str, k: int):
    """Loss, gradients, residual, firings and threshold's part, dense and in float64.

    Which latents are active is taken from the step's own encoding: that is not differentiable.
    """
    leaves = Parameters(*(p.double().clone().requires_grad_() for p in parameters))
    x, mask, gamma = batch.x.double(), batch.mask.double(), gamma.double()
    rows = mask.sum()
    pre = x @ leaves.encoder.T + leaves.encoder_bias
    observed, penalty = None, 0.0
    if name == "jumprelu":
        log = log_threshold(x).to(parameters.encoder.dtype)
        threshold = log.exp().double()
        fast = batch.x_fast.dtype
        z = encode_above(
            batch.x_fast,
            parameters.encoder.to(fast),
            parameters.encoder_bias.to(fast),
            torch.zeros_like(log),
        )
        z = exact(z, parameters, batch)
        z = dense(z, z.values.double(), D_SAE) * mask[:, None]
        active = (z > threshold).double()
        window = ((z - threshold).abs() < BANDWIDTH / 2).double() * (z > 0)
        observed = log.double().requires_grad_()
        latents = Jump.apply(pre, observed.exp(), active, window)
        l0 = Near.apply(observed.exp(), active, window).sum() / rows
        penalty = COEFFICIENT * (l0 / k - 1) ** 2
    else:
        active = codes_of(parameters, batch, name, k)
        latents = pre * active
        if name.startswith("relu"):
            penalty = L1 * latents.sum() / rows
    loss = penalty
    for _, stop in GROUPS if name == "matryoshka" else [(0, D_SAE)]:
        prefix = latents[:, :stop] @ leaves.decoder[:stop] + leaves.decoder_bias
        residual = (prefix - x) * mask[:, None]
        loss = loss + ((residual * gamma) ** 2).sum() / (rows * D_IN)
    loss.backward()
    by_threshold = None if observed is None else observed.grad
    gradients = Parameters(*(p.grad for p in leaves))
    return loss.detach(), gradients, residual.detach(), active.sum(0), by_threshold


def check_gradients(name: str, dtype: torch.dtype, k: int) -> None:
    parameters, batch, gamma = problem(dtype)
    step = step_of(name, parameters, batch, gamma, k)
    loss, gradients, residual, firings, by_threshold = autograd(parameters, batch, gamma, name, k)
    for part, found, expected in zip(Parameters._fields, step.gradients, gradients, strict=True):
        assert error(found, expected) < TOLERANCE[dtype], part
    assert error(step.residual, residual) < TOLERANCE[dtype]
    assert float(step.loss) == pytest.approx(float(loss), rel=TOLERANCE[dtype])
    assert torch.equal(step.firings.double(), firings)
    assert (batch.mask == 0).sum() > 50 and firings.min() < 0.7 * firings.max()
    if name == "jumprelu":
        assert error(step.observed, by_threshold) < TOLERANCE[dtype]
        assert (by_threshold != 0).sum() > 0.9 * D_SAE


@pytest.mark.parametrize("name", STEPS)
def test_gradients_are_those_of_dense_autograd(name):
    for dtype in TOLERANCE:
        check_gradients(name, dtype, K)


@pytest.mark.parametrize("name", ["batch-topk", "matryoshka"])
def test_the_threshold_lets_in_k_latents_a_row(name):
    """In float32, as a finished dictionary encodes, though bfloat16 picked them."""
    parameters, batch, gamma = problem(torch.bfloat16)
    threshold = step_of(name, parameters, batch, gamma).observed
    kept = batch.mask > 0
    pre = batch.x[kept] @ parameters.encoder.T + parameters.encoder_bias
    assert float((pre > threshold).sum() / kept.sum()) == pytest.approx(K, rel=0.01)


@pytest.mark.parametrize("name", ["topk", "batch-topk", "matryoshka"])
def test_gradients_with_one_latent_and_with_all(name):
    for k in (1, D_SAE):
        check_gradients(name, torch.float32, k)


@pytest.mark.parametrize("name", STEPS)
def test_a_batch_of_masked_rows_has_no_part(name):
    parameters, batch, gamma = problem(torch.float64)
    nothing = Batch(batch.x * 0, batch.x_fast * 0, batch.mask * 0)
    step = step_of(name, parameters, nothing, gamma)
    assert not any(part.any() for part in (*step.gradients, step.firings, step.residual))
    assert torch.isfinite(step.loss)
    assert name == "jumprelu" or step.observed is None or not step.observed.any()


# --- What is each architecture's own


def test_the_running_threshold_is_a_mean_over_the_last_tenth_of_the_steps():
    made = BatchTopK(K, 3)
    weights = []
    for _ in range(80):
        share = 10 / (len(weights) + 10)
        weights = [w * (1 - share) for w in weights] + [share]
        made.follow(torch.tensor(float(len(weights))), 0.1)
    expected = sum(w * (i + 1) for i, w in enumerate(weights))
    assert float(made.running_threshold) == pytest.approx(expected)
    assert 80 * 0.85 < expected < 80 and sum(weights[-16:]) > 0.8
    assert made.thresholds().tolist() == pytest.approx([expected] * 3)
    for _ in range(2000):
        made.follow(torch.tensor(5.0), 0.1)
    made.follow(torch.tensor(6.0), 0.1)
    assert float(made.running_threshold) == pytest.approx(5 + 1 / 100)


def test_groups_of_latents():
    assert group_bounds(D_SAE) == GROUPS
    assert group_bounds(24576)[0] == (0, 768) and group_bounds(24576)[-1] == (11520, 24576)
    assert group_bounds(2) == [(0, 1), (1, 2)] and group_bounds(1) == [(0, 1)]


def test_learnt_thresholds_start_where_k_latents_are_active_and_follow_adam():
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    pre = x @ initial_parameters(64, 512, 0, CPU).encoder.T
    made = JumpReLU(16, 512)
    l0 = float((pre > made.thresholds()).sum(1).float().mean())
    assert l0 == pytest.approx(16, rel=0.05)
    assert initial_threshold(512, 512) == BANDWIDTH / 2

    parameter = torch.full((512,), float(made.log_threshold[0]), requires_grad=True)
    optimiser = torch.optim.Adam([parameter], lr=0.01 * THRESHOLD_RATE_MULTIPLIER, eps=EPSILON)
    for seed in range(5):
        gradient = torch.randn(512, generator=torch.Generator().manual_seed(seed))
        parameter.grad = gradient.clone()
        optimiser.step()
        made.follow(gradient, 0.01)
    torch.testing.assert_close(made.log_threshold, parameter.detach(), rtol=1e-6, atol=1e-6)
