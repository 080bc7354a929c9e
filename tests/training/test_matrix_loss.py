"""A full matrix in the loss: every architecture's gradients against float64 autograd, and γ."""

import pytest
import torch

from llm_wsae.training.architectures import find_architecture
from llm_wsae.training.architectures.topk import TopK
from llm_wsae.training.auxk import DeadLatents, auxk_gradients
from llm_wsae.training.parameters import (
    Batch,
    Parameters,
    initial_parameters,
    squared,
    weighted_error,
)

D_IN, D_SAE, BATCH, K = 12, 40, 300, 4
STEPS = ("topk", "batch-topk", "matryoshka", "jumprelu", "relu, dense", "relu, sparse")


def step_of(name, parameters, batch, gamma):
    kind = find_architecture(name.split(",")[0])
    made = kind(0.01 if kind.setting == "l1" else K, D_SAE)
    if name == "jumprelu":
        made.log_threshold = torch.full((D_SAE,), -1.0).to(parameters.decoder)
    if name == "relu, sparse":
        return made.sparse_step(parameters, batch, gamma)
    return made.step(parameters, batch, gamma)


def problem(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = initial_parameters(D_IN, D_SAE, seed, torch.device("cpu"), torch.float64)
    noise = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in start]
    parameters = Parameters(*((p + 0.05 * n).to(dtype) for p, n in zip(start, noise, strict=True)))
    x = torch.randn(BATCH, D_IN, generator=generator, dtype=torch.float64)
    mask = (torch.rand(BATCH, generator=generator) > 0.1).to(dtype)
    x = x.to(dtype) * mask[:, None]
    gamma = torch.rand(D_IN, generator=generator, dtype=torch.float64).to(dtype) * 2
    matrix = torch.randn(D_IN, D_IN, generator=generator, dtype=torch.float64).to(dtype)
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
    loss, gradient = weighted_error(residual.detach(), batch.mask, matrix, batch.num_rows)
    expected = (residual @ matrix.T).square().sum() / (batch.mask.sum() * D_IN)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, residual)[0])


def test_topk_gradients_equal_autograd():
    parameters, batch, _, matrix = problem(torch.float64)
    found = TopK(K, D_SAE).step(parameters, batch, matrix)
    leaves = Parameters(*(p.clone().requires_grad_() for p in parameters))
    pre = batch.x @ leaves.encoder.T + leaves.encoder_bias
    top = pre.topk(K, dim=1)
    codes = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    error = (codes @ leaves.decoder + leaves.decoder_bias - batch.x) * batch.mask[:, None]
    loss = (error @ matrix.T).square().sum() / (batch.mask.sum() * D_IN)
    assert float(found.loss) == pytest.approx(float(loss.detach()), rel=1e-12)
    assert distance(found.gradients, torch.autograd.grad(loss, leaves)) < 1e-12


def test_auxk_uses_the_same_metric():
    parameters, batch, gamma, matrix = problem(torch.float64)
    residual = TopK(K, D_SAE).step(parameters, batch, matrix).residual
    dead = torch.tensor([3, 5, 8])
    found = DeadLatents(dead)
    gradients = [
        auxk_gradients(parameters, batch, residual, found, metric, 0.5)
        for metric in (gamma, gamma.diag(), matrix)
    ]
    assert all(torch.equal(one.latents, dead) for one in gradients)
    assert distance(gradients[1][1:], gradients[0][1:]) < 1e-12
    leaves = [parameter[dead].clone().requires_grad_() for parameter in parameters[:3]]
    encoder, decoder, bias = leaves
    error = ((batch.x @ encoder.T + bias).relu() @ decoder + residual) * batch.mask[:, None]
    metric = squared(matrix)
    loss = ((error @ metric) * error).sum() / ((residual @ metric) * residual).sum()
    assert distance(gradients[2][1:], torch.autograd.grad(0.5 * loss, leaves)) < 1e-12
