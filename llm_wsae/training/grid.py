"""The arms of a training from what a user asks for: rules × α × sparsity × seeds."""

from collections.abc import Iterable, Sequence
from itertools import product

from llm_wsae.errors import UsageError
from llm_wsae.training.architectures import find_architecture
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.config import ArchitectureName
from llm_wsae.weights.loss_weights import LossWeights


def make_arms(
    weights: Iterable[LossWeights],
    ks: Sequence[int],
    l1s: Sequence[float] = (),
    init_seeds: Sequence[int] = (0,),
    architectures: Sequence[ArchitectureName] = ("topk",),
) -> list[ArmConfig]:
    """Every combination of weights, architectures, their sparsities and seeds.

    ``ks`` are for every architecture except ``relu``, which takes ``l1s`` and need not be listed
    when there are some. Raises UsageError for ``relu`` without L1 coefficients, or a negative one.
    """
    if l1s and "relu" not in architectures:
        architectures = (*architectures, "relu")
    elif "relu" in architectures and not l1s:
        raise UsageError("the architecture relu needs at least one L1 coefficient (--l1)")
    arms = []
    for seed, w, name in product(init_seeds, weights, architectures):
        if find_architecture(name).setting == "k":
            arms += [ArmConfig(w, k=k, init_seed=seed, architecture=name) for k in ks]
        else:
            arms += [ArmConfig(w, l1=l1, init_seed=seed, architecture=name) for l1 in l1s]
    return arms
