"""A step never holds batch × d_sae, nor all gradients: counted, not timed."""

import pytest
import torch
from sparse_cases import needs_compiler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_wsae.sparse.operations import using
from llm_wsae.training.arm import Arm, ArmConfig
from llm_wsae.training.parameters import Batch
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.rules import RULES

D_IN, D_SAE, BATCH, K = 16, 16384, 2048, 4
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
        LossWeights(torch.ones(D_IN), RULES["uniform"]), K, architecture=architecture
    )
    arm = Arm(config, D_IN, D_SAE, CPU)
    x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(0))
    return arm, Batch(x, x.to(fast), torch.ones(BATCH))


@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["pytorch", COMPILED, "reference"])
def test_no_step_makes_a_dense_batch(name, architecture, fast):
    arm, batch = make(architecture, fast)
    arm.step(batch, BATCH, 1e-3, 0.0, 10**9)  # BatchTopK does not yet know its threshold
    with using(name), Sizes() as sizes:
        arm.step(batch, 2 * BATCH, 1e-3, 0.0, 10**9)
    if name == "reference":
        assert sizes.largest >= BATCH * D_SAE  # which is how one that does would be seen
    else:
        assert sizes.largest < BATCH * D_SAE


@pytest.mark.parametrize("name", ["pytorch", COMPILED])
def test_nor_does_one_that_revives_the_dead(name):
    """Nearly all are dead: still tiles of rows, and no second copy of the gradients."""
    arm, batch = make("topk", torch.bfloat16)
    arm.step(batch, BATCH, 1e-3, 0.0, 10**9)
    with using(name), Sizes() as sizes:
        arm.step(batch, 2 * BATCH, 1e-3, 1 / 32, BATCH // 2)
    assert int(arm.dead(2 * BATCH, BATCH // 2).sum()) > D_SAE // 2
    assert sizes.largest <= BATCH * D_SAE // 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["pytorch", COMPILED])
def test_gradients_are_never_held(name, architecture):
    """Those of all latents are as large as the weights: one is made when Adam comes to it. And the
    encoder's rounded copy is made once."""
    arm, batch = make(architecture, torch.bfloat16)
    arm.step(batch, BATCH, 1e-3, 1 / 32, 10**9)
    with using(name), Sizes() as sizes:
        arm.step(batch, 2 * BATCH, 1e-3, 1 / 32, 10**9)
    held = (D_SAE, D_IN) in sizes.made
    assert held == (name == "pytorch")  # which makes them all, and is how that would be seen
