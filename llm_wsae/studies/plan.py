"""The dictionaries of a study: the plain curve, the rules' arms, and a control for each of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from llm_wsae.errors import UsageError
from llm_wsae.studies.config import StudyConfig
from llm_wsae.training.arm import ArmConfig
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.loss_weights import LossWeights, takes_matrix, weights_from_rule
from llm_wsae.weights.rules import is_drawn

PLAIN = "uniform"


@dataclass(frozen=True)
class PlannedArm:
    """One dictionary of a study."""

    arm: ArmConfig
    label: str
    """Name of its weights, whatever the random draw: what it shares with other k and seeds."""
    control: str | None
    """Label of the arms that control it."""


def plan(inputs: RuleInputs, config: StudyConfig, weigh: WeightConfig) -> list[PlannedArm]:
    """All dictionaries, seed by seed, the plain ones first.

    Drawn weights (controls, ``random``) are drawn anew for every seed. Raises UsageError for a draw
    of its own, else as ``weights_from_rule`` does.
    """
    if weigh.draw:
        raise UsageError(
            f"draw is {weigh.draw}, but a study draws its controls anew for every seed; leave it 0"
        )
    arms: dict[str, PlannedArm] = {}

    def add(weights: LossWeights, control: str | None, ks: Sequence[int], seed: int) -> None:
        for k in ks:
            arm = ArmConfig(weights, k, init_seed=seed, architecture=config.architecture)
            # one that was named before, as a rule of its own, stays what it was
            arms.setdefault(arm.name, PlannedArm(arm, label_of(weights), control))

    for seed in dict.fromkeys(config.seeds):
        add(weights_from_rule(PLAIN, 1.0, inputs), None, config.curve, seed)
        for weights, control in _weights(inputs, config, weigh, seed):
            add(weights, control, config.ks, seed)
    return list(arms.values())


def _weights(
    inputs: RuleInputs, config: StudyConfig, weigh: WeightConfig, seed: int
) -> Iterator[tuple[LossWeights, str | None]]:
    """Weights and the label of their control, and each control itself."""
    for rule in config.rules:
        for alpha in config.alphas:
            weights = _drawn(rule, alpha, inputs, weigh, seed)
            if weights.name == PLAIN:
                continue
            named = control_of(rule, weigh)
            if named is None:
                yield weights, None
                continue
            control = _drawn(named, alpha, inputs, weigh, seed)
            yield weights, label_of(control)
            yield control, None


def _drawn(
    rule: str, alpha: float, inputs: RuleInputs, weigh: WeightConfig, seed: int
) -> LossWeights:
    own = replace(weigh, draw=seed if is_drawn(rule) else 0)
    return weights_from_rule(rule, alpha, inputs, WeightConfig() if rule == PLAIN else own)


def control_of(rule: str, weigh: WeightConfig) -> str | None:
    """The rule that has the same weights on other dimensions (or tokens), or the same spectrum with
    other directions. How many dimensions its loss hangs on is another matter, and never the same.

    None for what knows nothing of them already.
    """
    if rule == PLAIN or is_drawn(rule):
        return None
    return f"rotated:{rule}" if takes_matrix(rule, weigh) else f"permuted:{rule}"


def label_of(weights: LossWeights) -> str:
    """The name of the weights without the number of a random draw."""
    return replace(weights, config=replace(weights.config, draw=0)).name
