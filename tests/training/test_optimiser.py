"""The optimiser is Adam; decoder rows stay on the sphere, the copy of the encoder stays fresh."""

import pytest
import torch
from sparse_cases import needs_compiler

from llm_wsae.sparse.backends.reference import EPSILON
from llm_wsae.sparse.operations import using
from llm_wsae.training.optimiser import Optimiser
from llm_wsae.training.parameters import Parameters, initial_parameters

D_IN, D_SAE = 24, 50


def start():
    parameters = initial_parameters(D_IN, D_SAE, 0, torch.device("cpu"))
    parameters.encoder_bias.normal_(generator=torch.Generator().manual_seed(1))
    return parameters


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    made = Parameters(*(torch.randn(p.shape, generator=generator) * 1e-3 for p in start()))
    made.encoder[3] = 0  # a latent that did not fire
    return made


def move(optimiser, step, rate):
    *by_weights, by_decoder_bias = gradients(step)
    optimiser.step(tuple(by_weights), by_decoder_bias, rate)


@pytest.mark.parametrize("name", ["pytorch", pytest.param("cpu", marks=needs_compiler)])
def test_it_is_adam_with_the_decoder_on_the_sphere(name):
    parameters = start()
    optimiser = Optimiser(parameters)
    expected = [torch.nn.Parameter(p.double()) for p in start()]
    theirs = torch.optim.Adam(expected, eps=EPSILON)
    optimiser.encoder(torch.bfloat16)
    for step in range(5):
        rate = 0.01 / (step + 1)
        for parameter, gradient in zip(expected, gradients(step), strict=True):
            parameter.grad = gradient.double()
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        with torch.no_grad(), using(name):
            expected[1] /= expected[1].norm(dim=1, keepdim=True)
            move(optimiser, step, rate)
    for found, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted.data, rtol=1e-5, atol=1e-6)
    assert torch.equal(optimiser.encoder(torch.bfloat16), parameters.encoder.bfloat16())
    assert optimiser.encoder(torch.float32) is parameters.encoder


def test_dimensions_that_count_little_move_as_fast():
    """Gradients as small as steep weights make them, of a mean over rows and dimensions."""
    parameters = start()
    before = parameters.encoder.clone()
    small = Parameters(*(1e-7 * gradient for gradient in gradients(0)))
    Optimiser(parameters).step(small[:3], small.decoder_bias, 0.01)
    moved = (parameters.encoder - before).abs()
    assert (moved[4:] > 0.0099).float().mean() > 0.99 and not moved[3].any()


def test_a_restored_optimiser_goes_on_with_the_same_bits():
    whole, halves = start(), start()
    optimiser, first = Optimiser(whole), Optimiser(halves)
    for step in range(4):
        move(optimiser, step, 0.01)
    for step in range(2):
        move(first, step, 0.01)
    first.encoder(torch.bfloat16)
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    resumed = Parameters(*(p.clone() for p in halves))
    second = Optimiser(resumed)
    second.encoder(torch.bfloat16).zero_()  # what it kept from other parameters must not stay
    second.load_state(saved)
    assert torch.equal(second.encoder(torch.bfloat16), resumed.encoder.bfloat16())
    for step in (2, 3):
        move(second, step, 0.01)
    for one, other in zip(resumed, whole, strict=True):
        assert torch.equal(one, other)
    for name, tensor in optimiser.state().items():
        assert torch.equal(second.state()[name], tensor), name
