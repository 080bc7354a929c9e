"""The dictionaries of a study: plain ones, the rules' arms, and a control for each of them.

Beside them stand untrained and half-trained baselines, on which no verdict or correction depends.
They may still look interpretable (Korznikov et al. 2026, arXiv 2602.14111): where they come close
to the others, a measure says little of what was learnt.

The rule ``participation`` takes its weights from a first dictionary. Unless one is given, a study
trains a plain one for each seed, so that no accident of one dictionary stands behind all of them.
It gets half of the rows, and so do the dictionaries that are trained with its weights, and their
controls: a rule costs as many rows as a plain dictionary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_wsae.data.store import StoreSource
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.folder import INFO
from llm_wsae.lab.config import StudyGrid
from llm_wsae.lab.planting import PlantedSource
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.checkpoint import is_finished
from llm_wsae.training.config import ArchitectureName, Lengths, TrainConfig
from llm_wsae.training.trainer import train
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import LossWeights, weights_from_rule
from llm_wsae.weights.rules import Rule, RuleInputs
from llm_wsae.weights.weighing import used_decoder

PLAIN = "uniform"
RAW = "topk baseline: raw dimensions"
FROZEN: dict[ArchitectureName, str] = {
    "frozen-decoder": "topk baseline: frozen decoder",
    "frozen-encoder": "topk baseline: frozen encoder",
}
"""Labels of the half-trained baselines, by their architecture."""
BASELINES = (RAW, *FROZEN.values())
"""Labels of all baselines."""
_SHARE = 0.5  # of the rows, for a first dictionary, and again for what is trained after it
_OTHER = 1000  # seeds of first dictionaries: another start and another order of the rows


@dataclass(frozen=True)
class PlannedArm:
    """One dictionary of a study."""

    arm: ArmConfig
    label: str
    """Name of its weights without the random draw, shared with other k and seeds."""
    control: str | None
    """Label of its control."""
    share: float = 1.0
    """Of the rows: less if a first dictionary was trained on the others."""

    @property
    def name(self) -> str:
        """Of its folder and of its result."""
        return f"raw-dimensions-k{self.arm.k}" if self.label == RAW else self.arm.name

    @property
    def group(self) -> tuple[int, float]:
        """What dictionaries that are trained together share: their seed, and the share of rows."""
        return self.arm.init_seed, self.share

    def identity(self, lengths: Lengths) -> dict[str, Any]:
        """What its result must agree on, as JSON."""
        return self.arm.identity(lengths) | {"share": self.share, "rate": self.arm.rate(lengths)}


def plan(
    inputs: RuleInputs,
    grid: StudyGrid,
    weigh: WeightConfig,
    first: Mapping[int, RuleInputs] | None = None,
) -> list[PlannedArm]:
    """All dictionaries, seed by seed, the plain ones first.

    Controls are drawn again for every seed. ``first`` has, by seed, the inputs of rules that need a
    first dictionary, if the study has trained one for each. Raises as ``weights_from_rule`` does.
    """
    arms: dict[str, PlannedArm] = {}
    for seed in dict.fromkeys(grid.seeds):
        for weights, control, share in _weights(inputs, grid, weigh, first, seed):
            for k in grid.k:
                arm = ArmConfig(weights, k, init_seed=seed, architecture=grid.architecture)
                arms.setdefault(arm.name, PlannedArm(arm, weights.label, control, share))
    return list(arms.values())


def baselines(inputs: RuleInputs, grid: StudyGrid) -> list[PlannedArm]:
    """The raw dimensions, once, and for each seed a dictionary with a frozen decoder and one with a
    frozen encoder: all TopK, with the first k of the study.

    An architecture that all dictionaries of the study have is no baseline of it.
    """
    weights, k = weights_from_rule(PLAIN, 1.0, inputs), grid.k[0]
    found = [PlannedArm(ArmConfig(weights, k), RAW, None)]
    for seed in dict.fromkeys(grid.seeds):
        for name, label in FROZEN.items():
            if name != grid.architecture:
                arm = ArmConfig(weights, k, init_seed=seed, architecture=name)
                found.append(PlannedArm(arm, label, None))
    return found


def after_first(
    source: StoreSource | PlantedSource,
    inputs: RuleInputs,
    folder: Path,
    grid: StudyGrid,
    training: TrainConfig,
) -> dict[int, RuleInputs]:
    """By seed, the inputs with the decoder of its first dictionary.

    Where the study has none of that seed yet, it is trained: with the k of the others that it has,
    or else the first k that was asked for. Raises as ``train`` does.
    """
    found = {}
    known = {
        path.parents[1].name: Dictionary.load(path.parent)
        for path in sorted(folder.glob(f"*/*/{INFO}"))
        if is_finished(path.parents[1])
    }
    # what is trained with weights from them has one label, so they are to be alike
    k = next((first.info.training["k"] for first in known.values()), grid.k[0])
    for seed in dict.fromkeys(grid.seeds):
        first = known.get(f"s{seed}")
        if first is None:
            arm = ArmConfig(weights_from_rule(PLAIN, 1.0, inputs), k, init_seed=seed + _OTHER)
            half = replace(on_share(training, source, _SHARE), shuffle_seed=seed + _OTHER)
            first = train(source, [arm], half, folder / f"s{seed}")[arm.name]
        decoder, energy = used_decoder(first, source.site, inputs.statistics)
        found[seed] = replace(inputs, decoder=decoder, energy=energy)
    return found


def on_share(
    training: TrainConfig, source: StoreSource | PlantedSource, share: float
) -> TrainConfig:
    """The settings for a share of the rows. Raises UsageError if that is less than a batch."""
    if share == 1:
        return training
    return replace(training, tokens=int(share * (training.tokens or source.num_rows or 0)))


def _weights(
    inputs: RuleInputs,
    grid: StudyGrid,
    weigh: WeightConfig,
    first: Mapping[int, RuleInputs] | None,
    seed: int,
) -> Iterator[tuple[LossWeights, str | None, float]]:
    """The weights of a seed, the label of their control, and their share of the rows."""

    def drawn(rule: Rule, alpha: float) -> LossWeights:
        config = replace(weigh, draw=seed) if rule.is_drawn else weigh
        return weights_from_rule(rule, alpha, own, config)

    yield weights_from_rule(PLAIN, 1.0, inputs), None, 1.0
    for rule in grid.rules:
        own, share = inputs, 1.0
        if first is not None and rule.need == "dictionary":
            own, share = first[seed], _SHARE
        matched = rule.matched_control(weigh)
        for alpha in grid.alpha:
            weights = drawn(rule, alpha)
            if weights.label == PLAIN:
                continue
            control = None if matched is None else drawn(matched, alpha)
            yield weights, None if control is None else control.label, share
            if control is not None:
                yield control, None, share
