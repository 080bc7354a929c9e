"""The arms of a training from what a user asks for: rules × α × sparsity × seeds."""

from collections.abc import Iterable, Sequence

from llm_wsae.errors import UsageError
from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.config import Architecture
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.loss_weights import LossWeights, own_weights, weights_from_rule


def choose_weights(
    known: RuleInputs | Statistics,
    rules: Iterable[str],
    alphas: Sequence[float],
    own: LossWeights | None = None,
    config: WeightConfig = WeightConfig(),  # noqa: B008 - frozen
) -> list[LossWeights]:
    """Normalised weights for every rule and α, without repetitions, and a user's own last.

    ``uniform`` has no α, so it comes once, and is plain whatever ``config`` says. Raises UsageError
    for an unknown rule or one that lacks its input, LlmWsaeError for own weights
    that do not fit.
    """
    chosen: dict[str, LossWeights] = {}
    for rule in rules:
        plain = rule == "uniform"
        for alpha in (1.0,) if plain else alphas:
            weights = weights_from_rule(rule, alpha, known, WeightConfig() if plain else config)
            chosen.setdefault(weights.name, weights)
    if own is not None:
        weights = own_weights(own, known)
        chosen[weights.name] = weights
    return list(chosen.values())


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
