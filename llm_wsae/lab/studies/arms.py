"""The dictionaries of a study: plain ones, the rules' arms, and a control for each of them.

Beside them stand untrained and half-trained baselines, on which no verdict or correction depends.
They may still look interpretable (Korznikov et al. 2026, arXiv 2602.14111): where they come close
to the others, a measure says little of what was learnt.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from llm_wsae.lab.config import StudyGrid
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.config import ArchitectureName, Lengths
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import LossWeights, weights_from_rule
from llm_wsae.weights.rules import Rule, RuleInputs

PLAIN = "uniform"
RAW = "topk baseline: raw dimensions"
FROZEN: dict[ArchitectureName, str] = {
    "frozen-decoder": "topk baseline: frozen decoder",
    "frozen-encoder": "topk baseline: frozen encoder",
}
"""Labels of the half-trained baselines, by their architecture."""
BASELINES = (RAW, *FROZEN.values())
"""Labels of all baselines."""


@dataclass(frozen=True)
class PlannedArm:
    """One dictionary of a study."""

    arm: ArmConfig
    label: str
    """Name of its weights without the random draw, shared with other k and seeds."""
    control: str | None = None
    """Label of its control."""

    @property
    def name(self) -> str:
        """Of its folder and of its result."""
        return f"raw-dimensions-k{self.arm.k}" if self.label == RAW else self.arm.name

    def identity(self, lengths: Lengths) -> dict[str, Any]:
        """What its result must agree on, as JSON."""
        return self.arm.identity(lengths) | {"rate": self.arm.rate(lengths)}


def plan(inputs: RuleInputs, grid: StudyGrid, weigh: WeightConfig) -> list[PlannedArm]:
    """All dictionaries, seed by seed, the plain ones first.

    Controls are drawn again for every seed. Raises as ``weights_from_rule`` does.
    """
    arms: dict[str, PlannedArm] = {}
    for seed in dict.fromkeys(grid.seeds):
        for weights, control in _weights(inputs, grid, weigh, seed):
            for k in grid.k:
                arm = ArmConfig(weights, k, init_seed=seed, architecture=grid.architecture)
                arms.setdefault(arm.name, PlannedArm(arm, weights.label, control))
    return list(arms.values())


def _weights(
    inputs: RuleInputs, grid: StudyGrid, weigh: WeightConfig, seed: int
) -> Iterator[tuple[LossWeights, str | None]]:
    """The weights of a seed, each with the label of its control."""

    def drawn(rule: Rule, alpha: float) -> LossWeights:
        config = replace(weigh, draw=seed) if rule.is_drawn else weigh
        return weights_from_rule(rule, alpha, inputs, config)

    yield weights_from_rule(PLAIN, 1.0, inputs), None
    for rule, alpha in product(grid.rules, grid.alpha):
        weights, matched = drawn(rule, alpha), rule.matched_control(weigh)
        if weights.label == PLAIN:
            continue
        if matched is None:
            yield weights, None
        else:
            control = drawn(matched, alpha)
            yield weights, control.label
            yield control, None


def baselines(inputs: RuleInputs, grid: StudyGrid) -> list[PlannedArm]:
    """The raw dimensions, once, and for each seed a dictionary with a frozen decoder and one with a
    frozen encoder: all TopK, with the first k of the study. An architecture that all dictionaries
    of the study have is no baseline of it."""
    weights, k = weights_from_rule(PLAIN, 1.0, inputs), grid.k[0]
    found = [PlannedArm(ArmConfig(weights, k), RAW)]
    for seed, (name, label) in product(dict.fromkeys(grid.seeds), FROZEN.items()):
        if name != grid.architecture:
            arm = ArmConfig(weights, k, init_seed=seed, architecture=name)
            found.append(PlannedArm(arm, label))
    return found
