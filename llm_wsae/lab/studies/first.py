"""First dictionaries: the rule ``participation`` takes its weights from one.

Unless one is given, a study trains a plain one for each seed, so that no accident of one dictionary
stands behind all of them. It gets half of the rows, and so do the dictionaries that are trained
with its weights, and their controls: a rule costs as many rows as a plain dictionary.
"""

from dataclasses import replace
from pathlib import Path

import torch

from llm_wsae.data.store import StoreSource
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.folder import INFO
from llm_wsae.lab.planting.source import PlantedSource
from llm_wsae.lab.studies.config import StudyGrid
from llm_wsae.model.site import Site
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.checkpoint import is_finished
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.trainer import train
from llm_wsae.weights.loss_weights import weights_from_rule
from llm_wsae.weights.rules import RuleInputs
from llm_wsae.weights.weighing import used_decoder

SHARE = 0.5
"""Of the rows of a plain dictionary: for a first one, and again for what is trained after it."""
_OTHER = 1000  # seeds of their own: another start and another order of the rows


def stand_ins(inputs: RuleInputs, grid: StudyGrid) -> dict[int, RuleInputs]:
    """By seed, the inputs with a decoder of no consequence: what cannot be asked of the rules is
    found before a first dictionary is trained."""
    width = inputs.statistics.d_in
    one = replace(inputs, decoder=torch.eye(width), energy=torch.ones(width, dtype=torch.float64))
    return dict.fromkeys(grid.seeds, one)


def after_first(
    source: StoreSource | PlantedSource,
    site: Site,
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
    uniform = weights_from_rule("uniform", 1.0, inputs)
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
            arm = ArmConfig(uniform, k, init_seed=seed + _OTHER)
            half = replace(on_share(training, source, SHARE), shuffle_seed=seed + _OTHER)
            first = train(source, [arm], half, folder / f"s{seed}")[arm.name]
        decoder, energy = used_decoder(first, site, inputs.statistics)
        found[seed] = replace(inputs, decoder=decoder, energy=energy)
    return found


def on_share(
    training: TrainConfig, source: StoreSource | PlantedSource, share: float
) -> TrainConfig:
    """The settings for a share of the rows. Raises UsageError if that is less than a batch."""
    if share == 1:
        return training
    return replace(training, tokens=int(share * (training.tokens or source.num_rows or 0)))
