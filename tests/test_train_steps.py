"""The hand-written gradients against float64 autograd of the dense loss."""

import pytest
import torch

from llm_wsae.sparse.operations import encode_topk
from llm_wsae.train.auxk import add_auxk_gradients
from llm_wsae.train.parameters import Batch, Parameters, initial_parameters
from llm_wsae.train.relu import dense_relu_step, relu_step, sparse_relu_step
from llm_wsae.train.topk import topk_step

D_IN, D_SAE, BATCH, K, L1 = 32, 256, 1300, 8, 0.02


def problem(dtype, seed=0):
    """Parameters in general position and a batch with masked rows; γ has zeros in it."""
    generator = torch.Generator().manual_seed(seed)
    cpu = torch.device("cpu")
    start = initial_parameters(D_IN, D_SAE, seed, cpu, torch.float64)
    noise = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in start]
    parameters = Parameters(*(p + 0.05 * n for p, n in zip(start, noise, strict=True)))
    x = torch.randn(BATCH, D_IN, generator=generator, dtype=torch.float64)
    mask = (torch.rand(BATCH, generator=generator) > 0.1).double()
    x = x * mask[:, None]
    gamma = torch.rand(D_IN, generator=generator, dtype=torch.float64) * 2
    gamma[:3] = 0
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    parameters = Parameters(*(p.to(exact) for p in parameters))
    return parameters, Batch(x.to(exact), x.to(dtype), mask.to(exact)), gamma.to(exact)


def autograd(parameters, batch, gamma, latents_of):
    """Loss and gradients of the dense float64 form; ``latents_of(pre)`` → latents, penalty."""
    leaves = Parameters(*(p.double().requires_grad_() for p in parameters))
    x, mask = batch.x.double(), batch.mask.double()
    pre = x @ leaves.encoder.T + leaves.encoder_bias
    latents, penalty = latents_of(pre)
    residual = (latents @ leaves.decoder + leaves.decoder_bias - x) * mask[:, None]
    loss = ((residual * gamma.double()) ** 2).sum() / (mask.sum() * D_IN)
    loss = loss + (penalty * mask).sum() / mask.sum()
    loss.backward()
    return loss.detach(), Parameters(*(p.grad for p in leaves)), residual.detach()


def relative_error(gradients, expected):
    return max(
        float((g.double() - e).norm() / e.norm()) for g, e in zip(gradients, expected, strict=True)
    )


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("k", [1, K, D_SAE])
def test_topk_gradients(dtype, k):
    parameters, batch, gamma = problem(dtype)
    step = topk_step(parameters, batch, gamma, k)
    # the same codes for both: which latents are selected is not differentiable
    fast = batch.x_fast.dtype
    codes = encode_topk(
        batch.x_fast, parameters.encoder.to(fast), parameters.encoder_bias.to(fast), k
    )
    chosen = torch.zeros(BATCH, D_SAE).scatter_(1, codes.indices, (codes.values > 0).float())
    loss, expected, residual = autograd(
        parameters, batch, gamma, lambda pre: (pre * chosen, torch.zeros(BATCH))
    )
    assert relative_error(step.gradients, expected) < TOLERANCE[dtype]
    assert float(step.loss) == pytest.approx(float(loss), rel=TOLERANCE[dtype])
    assert torch.equal(step.firings.long(), chosen.sum(0).long())
    assert float((step.residual.double() - residual).norm() / residual.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("relu", [dense_relu_step, sparse_relu_step])
def test_relu_gradients(dtype, relu):
    parameters, batch, gamma = problem(dtype)
    step = relu(parameters, batch, gamma, L1)
    pre = torch.addmm(
        parameters.encoder_bias.to(dtype), batch.x_fast, parameters.encoder.T.to(dtype)
    )
    active = (pre > 0).double()
    loss, expected, _ = autograd(
        parameters, batch, gamma, lambda pre: (pre * active, L1 * (pre * active).sum(1))
    )
    assert relative_error(step.gradients, expected) < 2 * TOLERANCE[dtype]
    assert float(step.loss) == pytest.approx(float(loss), rel=TOLERANCE[dtype])
    assert torch.equal(step.firings.long(), active.sum(0).long())


def test_relu_goes_sparse_when_few_latents_are_active(monkeypatch):
    """The two ways agree to the precision of float32, and the number of active latents decides."""
    parameters, batch, gamma = problem(torch.float32)
    dense, sparse = (
        relu(parameters, batch, gamma, L1) for relu in (dense_relu_step, sparse_relu_step)
    )
    assert relative_error(sparse.gradients, dense.gradients) < 1e-5
    assert float(sparse.loss) == pytest.approx(float(dense.loss), rel=1e-5)
    assert torch.equal(sparse.firings, dense.firings)
    assert float((sparse.residual - dense.residual).norm() / dense.residual.norm()) < 1e-5

    monkeypatch.setattr("llm_wsae.train.relu.dense_relu_step", lambda *_: dense)
    monkeypatch.setattr("llm_wsae.train.relu.sparse_relu_step", lambda *_: sparse)
    assert relu_step(parameters, batch, gamma, L1) is dense
    fewer = parameters._replace(encoder_bias=parameters.encoder_bias - 5)
    assert relu_step(fewer, batch, gamma, L1) is sparse


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_dead", [1, 5, 100])
def test_auxk_gradients(dtype, num_dead):
    """Dead latents get the gradient of their loss in both matrices, and nobody else gets any."""
    parameters, batch, gamma = problem(dtype)
    residual = topk_step(parameters, batch, gamma, K).residual
    dead = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(1))[:num_dead]
    gradients = Parameters(*(torch.zeros_like(p) for p in parameters))
    loss = add_auxk_gradients(gradients, parameters, batch, residual, dead, gamma, 0.5)

    leaves = Parameters(*(p.double().requires_grad_() for p in parameters))
    fast_pre = torch.addmm(
        parameters.encoder_bias[dead].to(dtype),
        batch.x_fast,
        parameters.encoder[dead].T.to(dtype),
    ).relu()
    k_aux = min(num_dead, D_IN // 2)
    chosen = (fast_pre >= fast_pre.topk(k_aux).values[:, -1:]) & (fast_pre > 0)
    pre = batch.x.double() @ leaves.encoder[dead].T + leaves.encoder_bias[dead]
    target = -residual.double()
    error = ((pre * chosen) @ leaves.decoder[dead] - target) * batch.mask.double()[:, None]
    weight = gamma.double() ** 2
    expected_loss = (error**2 * weight).sum() / (target**2 * weight).sum()
    (0.5 * expected_loss).backward()
    expected = Parameters(*(p.grad for p in leaves))
    tolerance = 2 * TOLERANCE[dtype]
    for name in ("encoder", "decoder", "encoder_bias"):
        found, wanted = getattr(gradients, name).double(), getattr(expected, name)
        assert float((found - wanted).norm() / wanted.norm()) < tolerance, name
    assert expected.decoder_bias is None and not gradients.decoder_bias.any()
    assert float(loss) == pytest.approx(float(expected_loss), rel=tolerance)


def test_weights_of_one_are_the_plain_loss_and_masked_rows_have_no_part():
    parameters, batch, _ = problem(torch.float64)
    ones = torch.ones(D_IN, dtype=torch.float64)
    step = topk_step(parameters, batch, ones, K)
    kept = batch.mask > 0
    assert float(step.loss) == pytest.approx(float((step.residual[kept] ** 2).mean()))
    alone = Batch(batch.x[kept], batch.x_fast[kept], batch.mask[kept])
    assert relative_error(topk_step(parameters, alone, ones, K).gradients, step.gradients) < 1e-12
