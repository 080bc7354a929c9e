"""What a step computes and holds: AuxK's hand-written gradients against float64 autograd, which way
a ReLU arm goes, Adam as a step needs it, what may be held in memory; and that a step in several
processes is that of one, by rows and by latents, to the last digits."""

import numpy as np
import pytest
import torch
import training_cases as cases
from looping import over
from several import run
from sparse_cases import needs_compiler, of_all, using
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_cases import BATCH, CPU, D_IN, D_SAE, STEPS, TOLERANCE, K, largest_error, problem

from llm_wsae.machine.processes import join
from llm_wsae.sparse.codes import EPSILON, SparseGradients
from llm_wsae.training.architecture import Batch, Parameters, squared
from llm_wsae.training.architectures.relu import ReLU
from llm_wsae.training.architectures.topk import TopK
from llm_wsae.training.arm import (
    INITIAL_LENGTH,
    Arm,
    ArmConfig,
    DeadFinder,
    DeadLatents,
    Optimiser,
    auxk_gradients,
    initial_parameters,
)
from llm_wsae.training.strategy import SINGLE, Strategy, strategy_of
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.rules import RULES

BACKENDS = ["pytorch", pytest.param("cpu", marks=needs_compiler)]


@over(case=((None, False), (0.02, False), (0.01, True)))
def test_relu_goes_sparse_when_few_latents_are_active(case):
    """The number in the step before decides, also where it comes from a checkpoint."""
    parameters, batch, gamma = problem(torch.float32)
    share_before, is_sparse = case
    relu, resumed = ReLU(cases.L1, D_SAE), ReLU(cases.L1, D_SAE)
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


def revived(latents, given, strategy=SINGLE):
    """AuxK's gradients by all parameters, and the residual that is left for it."""
    parameters, batch, gamma = given
    metric = squared(gamma)
    residual = TopK(K, D_SAE).step(parameters, batch, metric).residual
    more = auxk_gradients(parameters, batch, residual, latents, metric, 0.5, strategy)
    return of_all(more, parameters), residual


@over(dtype=TOLERANCE, num_dead=(1, 5, 100), matrix=(False, True))
def test_auxk_gradients(dtype, num_dead, matrix):
    """Dead latents get the gradient of their loss in both matrices, and nobody else gets any. A
    mask over more latents gives the same."""
    given = parameters, batch, gamma = problem(dtype, matrix)
    some = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(1))
    dead = some[:num_dead]
    gradients, residual = revived(DeadLatents(dead), given)
    masked, _ = revived(DeadLatents(some, torch.arange(D_SAE) < num_dead), given)

    leaves = Parameters(*(p.double().clone().requires_grad_() for p in parameters))
    encoder, _, bias, _ = (part.to(dtype) for part in parameters)
    fast_pre = torch.addmm(bias[dead], batch.x_fast, encoder[dead].T).relu()
    chosen = fast_pre >= fast_pre.topk(min(num_dead, D_IN // 2)).values[:, -1:]
    pre = batch.x.double() @ leaves.encoder[dead].T + leaves.encoder_bias[dead]
    target = -residual.double()
    missed = (pre * (chosen & (fast_pre > 0))) @ leaves.decoder[dead] - target
    weigh = gamma.double() if matrix else gamma.double().diag()

    def weighted(rows):
        return ((rows @ weigh.T) ** 2 * batch.mask.double()[:, None]).sum()

    (0.5 * weighted(missed) / weighted(target)).backward()
    for found in (gradients, masked):
        wanted = [leaf.grad for leaf in leaves[:3]]
        assert largest_error(found[:3], wanted) < 2 * TOLERANCE[dtype]
    assert leaves.decoder_bias.grad is None  # what it explains is left over by the whole step


def test_products_of_the_dead_have_few_shapes():
    """oneDNN generates code for each on a CPU, and does not free all of it."""
    given, sizes = problem(torch.float32), set()

    class Watched(Strategy):
        def keep_largest(self, active, k):
            sizes.add(active.shape[1])
            return active

    for number in range(1, 70):
        gradients, _ = revived(DeadLatents(torch.arange(number)), given, Watched())
        assert not gradients.encoder[number:].any()
    assert sizes == {64, 128}
    nobody = DeadLatents(torch.arange(60), torch.zeros(60, dtype=torch.bool))
    assert not revived(nobody, given)[0].encoder.any()


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
@over(free_lengths=(False, True))
def test_it_is_adam_on_the_raw_rows(name, free_lengths):
    """That autograd folds, on a loss that pulls all that is seen towards other parameters. Decoder
    rows have norm 1, or free lengths that Adam moves too."""
    drawn, target = initial_parameters(24, 50, 0, CPU), initial_parameters(24, 50, 1, CPU)
    target.encoder_bias.normal_(generator=torch.Generator().manual_seed(2))
    if not free_lengths:
        target.encoder[3] = drawn.encoder[3]  # of a latent that did not fire
    length = INITIAL_LENGTH if free_lengths else 1.0
    raw = [length * drawn.encoder, length * drawn.decoder, *drawn[2:]]
    raw = [torch.nn.Parameter(one.double()) for one in raw]
    theirs = torch.optim.Adam(raw, eps=EPSILON)

    def seen():
        encoder, decoder, bias, decoder_bias = raw
        if not free_lengths:
            return Parameters(*raw)
        length = decoder.norm(dim=1)
        rows = (encoder * length[:, None], decoder / length[:, None])
        return Parameters(*rows, bias * length, decoder_bias)

    ours = Optimiser(drawn, free_lengths)
    ours.encoder(torch.bfloat16)
    for step in range(6):
        rate = 0.02 / (step + 1)
        theirs.zero_grad()
        sum(((a - b) ** 2).sum() for a, b in zip(seen(), target, strict=True)).backward()
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        *by_weights, by_decoder_bias = (2 * (a - b) for a, b in zip(drawn, target, strict=True))
        with torch.no_grad(), using(name):
            if not free_lengths:
                raw[1] /= raw[1].norm(dim=1, keepdim=True)
            ours.step(tuple(by_weights), by_decoder_bias, rate)
    for found, wanted in zip(drawn, seen(), strict=True):
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn.decoder.norm(dim=1), torch.ones(50))
    assert torch.equal(ours.encoder(torch.bfloat16), drawn.encoder.bfloat16())
    assert ours.encoder(torch.float32) is drawn.encoder


WIDE_D_IN, WIDE_D_SAE, WIDE_BATCH, WIDE_K = 16, 4160, 4096, 4
SPARSE = ["topk", "batch-topk", "jumprelu", "matryoshka"]


class Sizes(TorchDispatchMode):
    """The tensors that operations within the block make: the largest size, and all shapes."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.made = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        given = {memory for _, memory in tensors_in((arguments, options))}
        for tensor, memory in tensors_in(result):
            self.largest = max(self.largest, tensor.numel())
            if memory not in given:
                self.made.add(tuple(tensor.shape))
        return result


def tensors_in(values):
    """With where each is in memory."""
    leaves = filter(torch.is_tensor, tree_leaves(values))
    return [(tensor, tensor.untyped_storage().data_ptr()) for tensor in leaves]


def sizes_of_a_step(name, architecture, dead_after=10**9):
    """Of the second step: before it, BatchTopK does not know its threshold."""
    weights = LossWeights(torch.ones(WIDE_D_IN), RULES["uniform"])
    level = {"l1": 0.1} if architecture == "relu" else {"k": WIDE_K}
    arm = Arm(ArmConfig(weights, **level, architecture=architecture), WIDE_D_IN, WIDE_D_SAE, CPU)
    x = torch.randn(WIDE_BATCH, WIDE_D_IN, generator=torch.Generator().manual_seed(0))
    batch = Batch(x, x.bfloat16(), torch.ones(WIDE_BATCH))
    arm.step(batch, WIDE_BATCH, 1e-3, 1 / 32, 10**9)
    with using(name), Sizes() as sizes:
        arm.step(batch, 2 * WIDE_BATCH, 1e-3, 1 / 32, dead_after)
    return sizes


@pytest.mark.parametrize("name", BACKENDS)
@over(architecture=[*SPARSE, "relu", "gba"])
def test_no_step_makes_a_dense_batch_or_holds_all_gradients(name, architecture):
    """Not even for a moment: a batch would be half a gigabyte for 4096 rows and 32 k latents, and
    gradients are as large as the weights: one is made when Adam comes to it. The encoder's rounded
    copy is made once."""
    sizes = sizes_of_a_step(name, architecture)
    assert sizes.largest < WIDE_BATCH * WIDE_D_SAE
    held = (WIDE_D_SAE, WIDE_D_IN) in sizes.made
    if architecture in SPARSE:
        assert held == (name == "pytorch")  # which makes them all, and is how that would be seen


@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_that_revives_the_dead_makes_no_dense_batch(name):
    """All are dead: still tiles of rows, and no second copy of the gradients."""
    sizes = sizes_of_a_step(name, "topk", WIDE_BATCH // 2)
    assert sizes.largest == WIDE_BATCH * WIDE_D_SAE // 4
    with Sizes() as sizes:  # it would be seen
        torch.ones(WIDE_BATCH, 1) * torch.ones(WIDE_D_SAE)
    assert sizes.largest == WIDE_BATCH * WIDE_D_SAE


# --- In several processes

SEVERAL = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Relative difference of sums that were added up in another order; in bfloat16 many values tie for
the last place among the k largest, and which of them is taken depends on who has them."""
DEAD = [0, 3, 7, *range(100, 160)]  # unevenly shared, and more than take part in a row
CASES = [
    *((2, shard, dtype, False) for shard in ("rows", "latents") for dtype in SEVERAL),
    (3, "rows", torch.float64, True),  # the third has no row
    (4, "latents", torch.float64, True),  # the inner prefixes are all the first one's
]


def numbers(strategy: Strategy, name: str, dtype: torch.dtype, matrix: bool) -> dict:
    """Everything that a step and AuxK tell, from this process's part of a problem. Rows come in
    parts of different lengths, one of them 0."""
    parameters, batch, gamma = problem(dtype, matrix)
    own = strategy.own_latents(D_SAE)
    parts = [p[own.start : own.stop] for p in parameters[:3]]
    parameters = Parameters(*parts, parameters.decoder_bias)
    if strategy.shares_rows:
        bounds, rank = [0, 900, BATCH, BATCH], strategy.row_part[0]
        rows = slice(bounds[rank], bounds[rank + 1])
        elsewhere = batch.mask.sum() - batch.mask[rows].sum()
        batch = Batch(*(part[rows] for part in batch[:3]), elsewhere)
    step = cases.step_of(name, parameters, batch, gamma, strategy=strategy)
    dead = DeadLatents(torch.tensor([i - own.start for i in DEAD if i in own], dtype=torch.int64))
    more = auxk_gradients(parameters, batch, step.residual, dead, squared(gamma), 0.5, strategy)
    revived, gradients = of_all(more, parameters), cases.gradients_of(step)
    strategy.sum_over_rows_([*gradients, step.firings, step.loss, *revived])
    found = {"residual": step.residual, "loss": step.loss, "firings": step.firings}
    found |= gradients._asdict() | {f"revived {key}": v for key, v in revived._asdict().items()}
    if step.observed is not None:
        found["observed"] = step.observed
    return {key: part.double().numpy() for key, part in found.items()}


def all_steps(shard: str, dtype: torch.dtype, matrix: bool) -> dict[str, dict]:
    everyone = join()
    with everyone.together(), strategy_of(everyone, CPU, shard) as strategy:
        return {name: numbers(strategy, name, dtype, matrix) for name in STEPS}


@over(case=CASES)
def test_a_step_of_several_is_that_of_one(case):
    """And what all processes have are the same bits."""
    size, shard, dtype, matrix = case
    outcomes = run(size, all_steps, shard, dtype, matrix)
    for name in STEPS:
        alone = numbers(SINGLE, name, dtype, matrix)
        for key, expected in alone.items():
            parts = [outcome[name][key] for outcome in outcomes]
            found = parts[0]
            if found.shape != expected.shape:  # of one's own rows or latents
                found = np.concatenate(parts)
            else:
                assert all((part == found).all() for part in parts), (name, key)
            difference = np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)
            assert difference < SEVERAL[dtype], (name, key)
            if key == "firings":
                assert found.sum() == expected.sum()
                assert dtype == torch.bfloat16 or (found == expected).all()
        assert alone["revived encoder"].any()
