"""From a trained arm to a dictionary that knows where it came from."""

import dataclasses
from typing import Any

from llm_wsae.data.shuffling import ActivationSource
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.provenance import command_line, versions
from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.arm import Arm, folded
from llm_wsae.training.normaliser import Normaliser


def dictionary_of(
    arm: Arm,
    source: ActivationSource,
    statistics: Statistics,
    normaliser: Normaliser,
    numbers: dict[str, float],
    settings: dict[str, Any],
) -> Dictionary:
    """The dictionary in the model's own units, from an arm that holds all latents.

    ``numbers`` are what was last logged of it, ``settings`` those of the training.
    """
    weights, provenance = arm.config.weights, source.identity()
    info = DictionaryInfo(
        site=str(source.site),
        name=arm.config.name,
        rule=weights.rule.name,
        alpha=weights.alpha,
        weights=dataclasses.asdict(weights.config),
        seed=arm.config.init_seed,
        context_size=statistics.context_size,
        prepend_bos=provenance.get("packing", {}).get("prepend_bos"),
        massive_threshold=statistics.massive_threshold,
        model=provenance.get("model", {}),
        corpus=provenance.get("corpus", {}),
        store=provenance,
        metrics={"training": numbers},
        training={
            **settings,
            **arm.config.kind(),
            "command": command_line(),
            "versions": versions(),
        },
    )
    threshold = None if arm.memory is None else arm.memory.thresholds()
    space = weights.gamma if weights.config.place == "space" else None
    return Dictionary(
        **folded(arm.parameters, normaliser.mean, normaliser.scale, threshold, space),
        sparsity=arm.config.sparsity,
        info=info,
        extras={
            "gamma": weights.gamma,
            "mean": statistics.mean.float(),
            "variance": statistics.variance.float(),
            "robust_variance": statistics.robust_variance.float(),
        },
    )
