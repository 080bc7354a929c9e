"""Adam as a step needs it, and what a step may hold in memory."""

import pytest
import torch
from sparse_cases import needs_compiler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_wsae.sparse.backends.reference import EPSILON
from llm_wsae.sparse.operations import using
from llm_wsae.training.arm import Arm, ArmConfig
from llm_wsae.training.optimiser import Optimiser
from llm_wsae.training.parameters import Batch, Parameters, initial_parameters
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.rules import RULES

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


WIDE_D_IN, WIDE_D_SAE, WIDE_BATCH, WIDE_K = 16, 16384, 2048, 4
CPU = torch.device("cpu")
COMPILED = pytest.param("cpu", marks=needs_compiler)
ARCHITECTURES = ["topk", "batch-topk", "jumprelu", "matryoshka"]


class Sizes(TorchDispatchMode):
    """The storages that operations within the block make: the largest size, and all shapes."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.made = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        given = {id_of(t) for t in tree_leaves((arguments, options)) if torch.is_tensor(t)}
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor):
                self.largest = max(self.largest, tensor.numel())
                if id_of(tensor) not in given:
                    self.made.add(tuple(tensor.shape))
        return result


def id_of(tensor):
    return tensor.untyped_storage().data_ptr()


def make(architecture, fast):
    config = ArmConfig(
        LossWeights(torch.ones(WIDE_D_IN), RULES["uniform"]), WIDE_K, architecture=architecture
    )
    arm = Arm(config, WIDE_D_IN, WIDE_D_SAE, CPU)
    x = torch.randn(WIDE_BATCH, WIDE_D_IN, generator=torch.Generator().manual_seed(0))
    return arm, Batch(x, x.to(fast), torch.ones(WIDE_BATCH))


@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["pytorch", COMPILED])
def test_no_step_makes_a_dense_batch(name, architecture, fast):
    assert largest_of_a_step(name, architecture, fast) < WIDE_BATCH * WIDE_D_SAE


def test_a_step_that_makes_a_dense_batch_is_seen():
    assert largest_of_a_step("reference", "topk", torch.float32) >= WIDE_BATCH * WIDE_D_SAE


def largest_of_a_step(name, architecture, fast):
    arm, batch = make(architecture, fast)
    arm.step(batch, WIDE_BATCH, 1e-3, 0.0, 10**9)  # BatchTopK does not yet know its threshold
    with using(name), Sizes() as sizes:
        arm.step(batch, 2 * WIDE_BATCH, 1e-3, 0.0, 10**9)
    return sizes.largest


@pytest.mark.parametrize("name", ["pytorch", COMPILED])
def test_nor_does_one_that_revives_the_dead(name):
    """Nearly all are dead: still tiles of rows, and no second copy of the gradients."""
    arm, batch = make("topk", torch.bfloat16)
    arm.step(batch, WIDE_BATCH, 1e-3, 0.0, 10**9)
    with using(name), Sizes() as sizes:
        arm.step(batch, 2 * WIDE_BATCH, 1e-3, 1 / 32, WIDE_BATCH // 2)
    assert int(arm.dead(2 * WIDE_BATCH, WIDE_BATCH // 2).sum()) > WIDE_D_SAE // 2
    assert sizes.largest <= WIDE_BATCH * WIDE_D_SAE // 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["pytorch", COMPILED])
def test_gradients_are_never_held(name, architecture):
    """Those of all latents are as large as the weights: one is made when Adam comes to it. And the
    encoder's rounded copy is made once."""
    arm, batch = make(architecture, torch.bfloat16)
    arm.step(batch, WIDE_BATCH, 1e-3, 1 / 32, 10**9)
    with using(name), Sizes() as sizes:
        arm.step(batch, 2 * WIDE_BATCH, 1e-3, 1 / 32, 10**9)
    held = (WIDE_D_SAE, WIDE_D_IN) in sizes.made
    assert held == (name == "pytorch")  # which makes them all, and is how that would be seen
