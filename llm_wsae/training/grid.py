"""The arms of a training from what a user asks for: rules × α × sparsity × seeds."""

from collections.abc import Iterable, Sequence

from llm_wsae.errors import UsageError
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.config import Architecture
from llm_wsae.weights.loss_weights import LossWeights


def make_arms(
    weights: Iterable[LossWeights],
    ks: Sequence[int],
    l1s: Sequence[float] = (),
    init_seeds: Sequence[int] = (0,),
    architectures: Sequence[Architecture] = ("topk",),
) -> list[ArmConfig]:
    """Every combination; ``ks`` for each of the architectures, ReLU arms for ``l1s``.

    Raises UsageError for a negative L1 coefficient.
    """
    for l1 in l1s:
        if l1 < 0:
            raise UsageError(f"an L1 coefficient must not be negative, but one is {l1:g}")
    return [
        arm
        for seed in init_seeds
        for w in weights
        for arm in (
            *(ArmConfig(w, k=k, init_seed=seed, architecture=a) for a in architectures for k in ks),
            *(ArmConfig(w, l1=l1, init_seed=seed) for l1 in l1s),
        )
    ]
