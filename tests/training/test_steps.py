"""What a step computes and holds.

AuxK's hand-written gradients against float64 autograd, which way a ReLU arm goes, Adam as a step
needs it, and what a step may hold in memory.
"""

import pytest
import torch
from looping import over
from sparse_cases import needs_compiler, of_all, using
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_cases import (
    BATCH,
    CPU,
    D_IN,
    D_SAE,
    L1,
    TOLERANCE,
    K,
    error,
    largest_error,
    problem,
)

from llm_wsae.sparse.codes import EPSILON, SparseGradients
from llm_wsae.training.architecture import Batch, Parameters, squared
from llm_wsae.training.architectures.relu import ReLU
from llm_wsae.training.architectures.topk import TopK
from llm_wsae.training.arm import Arm, ArmConfig
from llm_wsae.training.auxk import DeadFinder, DeadLatents, auxk_gradients
from llm_wsae.training.optimiser import INITIAL_LENGTH, Optimiser, initial_parameters
from llm_wsae.training.strategy import Strategy
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.rules import RULES

BACKENDS = ["pytorch", pytest.param("cpu", marks=needs_compiler)]


def test_relu_goes_sparse_when_few_latents_are_active():
    """The number in the step before decides, also where it comes from a checkpoint."""
    parameters, batch, gamma = problem(torch.float32)
    for share_before, is_sparse in ((None, False), (0.02, False), (0.01, True)):
        relu, resumed = ReLU(L1, D_SAE), ReLU(L1, D_SAE)
        if share_before is not None:
            relu.follow(torch.tensor(share_before), 0.1)
        resumed.load_state(relu.state())
        step = resumed.step(parameters, batch, squared(gamma))
        assert isinstance(step.by_weights, SparseGradients) == is_sparse
        share = float(step.firings.sum() / (batch.mask.sum() * D_SAE))
        assert float(step.observed) == pytest.approx(share)


@needs_compiler
@over(architecture=["topk", "batch-topk", "matryoshka", "jumprelu"])
def test_a_whole_step_is_that_of_plain_torch(architecture):
    """What comes to Adam, told by its moments: of all weights, AuxK's part of the dead included."""
    _, batch, gamma = problem(torch.float32)
    moments = {}
    for name in ("cpu", "pytorch"):
        arm = Arm(ArmConfig(LossWeights(gamma), K, architecture=architecture), D_IN, D_SAE, CPU)
        arm.parameters.encoder[100:] *= 0.05  # positive often enough, never among the largest
        arm.last_fired[100:] = -(10**6)
        with using(name):
            arm.step(batch, BATCH, 1e-3, aux=1.0, dead_after=10**5)
        moments[name] = [arm.state()[f"{part}.exp_avg"] for part in Parameters._fields]
    assert largest_error(*moments.values()) < 1e-5
    silent = arm.last_fired < 0
    assert silent.sum() == D_SAE - 100
    assert moments[name][0][silent].any() == arm.architecture.revives_dead


def residual_of(parameters, batch, gamma):
    return TopK(K, D_SAE).step(parameters, batch, squared(gamma)).residual


@over(dtype=TOLERANCE, num_dead=(1, 5, 100), matrix=(False, True))
def test_auxk_gradients(dtype, num_dead, matrix):
    """Dead latents get the gradient of their loss in both matrices, and nobody else gets any."""
    parameters, batch, gamma = problem(dtype)
    if matrix:
        draw = torch.Generator().manual_seed(2)
        gamma = torch.randn(D_IN, D_IN, generator=draw, dtype=torch.float64).to(gamma)
    residual = residual_of(parameters, batch, gamma)
    dead = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(1))[:num_dead]
    more = auxk_gradients(parameters, batch, residual, DeadLatents(dead), squared(gamma), 0.5)
    gradients = of_all(more, parameters)

    leaves = Parameters(*(p.double().clone().requires_grad_() for p in parameters))
    encoder, _, bias, _ = (part.to(dtype) for part in parameters)
    fast_pre = torch.addmm(bias[dead], batch.x_fast, encoder[dead].T).relu()
    k_aux = min(num_dead, D_IN // 2)
    chosen = (fast_pre >= fast_pre.topk(k_aux).values[:, -1:]) & (fast_pre > 0)
    pre = batch.x.double() @ leaves.encoder[dead].T + leaves.encoder_bias[dead]
    target = -residual.double()
    missed = (pre * chosen) @ leaves.decoder[dead] - target
    weigh = gamma.double() if matrix else gamma.double().diag()

    def weighted(rows):
        return ((rows @ weigh.T) ** 2 * batch.mask.double()[:, None]).sum()

    (0.5 * weighted(missed) / weighted(target)).backward()
    for name in ("encoder", "decoder", "encoder_bias"):
        found, wanted = getattr(gradients, name), getattr(leaves, name).grad
        assert error(found, wanted) < 2 * TOLERANCE[dtype], name
    assert leaves.decoder_bias.grad is None  # what it explains is left over by the whole step


def test_auxk_with_latents_that_only_may_be_dead():
    """A mask over more latents gives the gradients of the dead ones."""
    parameters, batch, gamma = problem(torch.float64)
    residual = residual_of(parameters, batch, gamma)
    some = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(1))[:60]
    for num_dead in (0, 1, D_IN // 2, 40):
        is_dead = torch.arange(60) % 60 < num_dead
        masked, alone = (
            of_all(
                auxk_gradients(parameters, batch, residual, latents, squared(gamma), 0.5),
                parameters,
            )
            for latents in (DeadLatents(some, is_dead), DeadLatents(some[is_dead]))
        )
        for one, other in zip(masked, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        assert bool(alone.encoder.any()) == bool(num_dead)


def test_products_of_the_dead_have_few_shapes():
    """oneDNN generates code for each on a CPU, and does not free all of it."""
    parameters, batch, gamma = problem(torch.float32)
    residual, sizes = residual_of(parameters, batch, gamma), set()

    class Watched(Strategy):
        def keep_largest(self, active, k):
            sizes.add(active.shape[1])
            return active

    for number in range(1, 70):
        found = DeadLatents(torch.arange(number))
        more = auxk_gradients(parameters, batch, residual, found, squared(gamma), 0.5, Watched())
        assert len(more.encoder) == len(more.decoder) == len(more.bias) == number
    assert sizes == {64, 128}


def test_the_dead_are_the_same_whether_looked_for_now_and_then():
    """And there are fewer searches than steps."""
    always, seldom = DeadFinder(CPU), DeadFinder(CPU)
    seldom._waits = True
    last_fired = torch.zeros(50, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    searches, sizes = set(), []
    for rows_seen in range(64, 64 * 200, 64):
        last_fired[torch.rand(50, generator=generator) < 0.05] = rows_seen
        expected = always.find(last_fired, rows_seen, 2048)
        found = seldom.find(last_fired, rows_seen, 2048)
        assert expected.dead is None
        assert torch.equal(found.indices[found.dead], expected.indices)
        searches.add(seldom._until)
        sizes.append(len(expected.indices))
    assert max(sizes) > 5 and len(searches) < 199 / 2


@pytest.mark.parametrize("name", BACKENDS)
def test_it_is_adam_with_decoder_rows_of_norm_one(name):
    parameters = initial_parameters(24, 50, 0, CPU)
    parameters.encoder_bias.normal_(generator=torch.Generator().manual_seed(1))
    expected = [torch.nn.Parameter(p.double()) for p in parameters]
    optimiser = Optimiser(parameters)
    theirs = torch.optim.Adam(expected, eps=EPSILON)
    optimiser.encoder(torch.bfloat16)
    for step in range(5):
        draw, rate = torch.Generator().manual_seed(step), 0.01 / (step + 1)
        gradients = [torch.randn(p.shape, generator=draw) * 1e-3 for p in parameters]
        gradients[0][3] = 0  # a latent that did not fire
        for parameter, gradient in zip(expected, gradients, strict=True):
            parameter.grad = gradient.double()
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        with torch.no_grad(), using(name):
            expected[1] /= expected[1].norm(dim=1, keepdim=True)
            optimiser.step(tuple(gradients[:3]), gradients[3], rate)
    for found, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted.data, rtol=1e-5, atol=1e-6)
    assert torch.equal(optimiser.encoder(torch.bfloat16), parameters.encoder.bfloat16())
    assert optimiser.encoder(torch.float32) is parameters.encoder


def test_free_lengths_are_adam_on_the_raw_rows():
    """That autograd folds, on a loss that pulls all that is seen towards other parameters."""
    drawn = initial_parameters(12, 30, 0, CPU)
    target = initial_parameters(12, 30, 1, CPU)
    target.encoder_bias.normal_(generator=torch.Generator().manual_seed(2))

    raw = [INITIAL_LENGTH * drawn.encoder, INITIAL_LENGTH * drawn.decoder, *drawn[2:]]
    raw = [torch.nn.Parameter(one.double()) for one in raw]
    theirs = torch.optim.Adam(raw, lr=0.02, eps=EPSILON)

    def seen():
        encoder, decoder, bias, decoder_bias = raw
        length = decoder.norm(dim=1)
        rows = (encoder * length[:, None], decoder / length[:, None])
        return Parameters(*rows, bias * length, decoder_bias)

    ours = Optimiser(drawn, free_lengths=True)
    for _ in range(6):
        theirs.zero_grad()
        sum(((a - b) ** 2).sum() for a, b in zip(seen(), target, strict=True)).backward()
        theirs.step()
        *by_weights, by_decoder_bias = (2 * (a - b) for a, b in zip(drawn, target, strict=True))
        ours.step(tuple(by_weights), by_decoder_bias, 0.02)
    for found, wanted in zip(drawn, seen(), strict=True):
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn.decoder.norm(dim=1), torch.ones(30))


WIDE_D_IN, WIDE_D_SAE, WIDE_BATCH, WIDE_K = 16, 16384, 2048, 4
SPARSE = ["topk", "batch-topk", "jumprelu", "matryoshka"]


class Sizes(TorchDispatchMode):
    """The tensors that operations within the block make: the largest size, and all shapes."""

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


def sizes_of_a_step(name, architecture, aux, dead_after=10**9):
    """Of the second step: before it, BatchTopK does not know its threshold."""
    weights = LossWeights(torch.ones(WIDE_D_IN), RULES["uniform"])
    level = {"l1": 0.1} if architecture == "relu" else {"k": WIDE_K}
    arm = Arm(ArmConfig(weights, **level, architecture=architecture), WIDE_D_IN, WIDE_D_SAE, CPU)
    x = torch.randn(WIDE_BATCH, WIDE_D_IN, generator=torch.Generator().manual_seed(0))
    batch = Batch(x, x.bfloat16(), torch.ones(WIDE_BATCH))
    arm.step(batch, WIDE_BATCH, 1e-3, aux, 10**9)
    with using(name), Sizes() as sizes:
        arm.step(batch, 2 * WIDE_BATCH, 1e-3, aux, dead_after)
    return arm, sizes


@pytest.mark.parametrize("name", BACKENDS)
@over(architecture=[*SPARSE, "relu", "gba"])
def test_no_step_makes_a_dense_batch_or_holds_all_gradients(name, architecture):
    """Not even for a moment: a batch would be half a gigabyte for 4096 rows and 32 k latents, and
    gradients are as large as the weights: one is made when Adam comes to it. The encoder's rounded
    copy is made once."""
    _, sizes = sizes_of_a_step(name, architecture, 1 / 32)
    assert sizes.largest < WIDE_BATCH * WIDE_D_SAE
    held = (WIDE_D_SAE, WIDE_D_IN) in sizes.made
    if architecture in SPARSE:
        assert held == (name == "pytorch")  # which makes them all, and is how that would be seen


def test_a_dense_batch_is_seen():
    with Sizes() as sizes:
        torch.ones(WIDE_BATCH, 1) * torch.ones(WIDE_D_SAE)
    assert sizes.largest == WIDE_BATCH * WIDE_D_SAE


@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_that_revives_the_dead_makes_no_dense_batch(name):
    """Nearly all are dead: still tiles of rows, and no second copy of the gradients."""
    arm, sizes = sizes_of_a_step(name, "topk", 1 / 32, WIDE_BATCH // 2)
    assert int(arm.dead(2 * WIDE_BATCH, WIDE_BATCH // 2).sum()) > WIDE_D_SAE // 2
    assert sizes.largest <= WIDE_BATCH * WIDE_D_SAE // 4
