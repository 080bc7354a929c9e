"""Loss weights for SAELens' own training: its classes, with ‖Γ(x − x̂)‖² in place of ‖x − x̂‖².

    from llm_wsae.saelens import WeightedTopKTrainingSAEConfig

    sae = WeightedTopKTrainingSAEConfig(
        d_in=576, d_sae=4608, k=32, weights_file="weights.safetensors"
    )
    LanguageModelSAETrainingRunner(LanguageModelSAERunnerConfig(sae=sae, ...)).run()

The file is what ``llm-wsae weigh`` writes. Naming a class registers all of them with SAELens, under
``wsae_topk`` and so on, so that its runner, its trainer, its checkpoints and its command line know
them; ``register`` does so without naming one. What SAELens saves at the end is a dictionary of its
ordinary architectures, and ``Dictionary.load`` reads it and its rule.

SAELens is imported only then: this module comes without it.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from llm_wsae.errors import LlmWsaeError

if TYPE_CHECKING:
    from llm_wsae.saelens.training import (
        WeightedBatchTopKTrainingSAE,
        WeightedBatchTopKTrainingSAEConfig,
        WeightedJumpReLUTrainingSAE,
        WeightedJumpReLUTrainingSAEConfig,
        WeightedMatryoshkaBatchTopKTrainingSAE,
        WeightedMatryoshkaBatchTopKTrainingSAEConfig,
        WeightedStandardTrainingSAE,
        WeightedStandardTrainingSAEConfig,
        WeightedTopKTrainingSAE,
        WeightedTopKTrainingSAEConfig,
    )

__all__ = [
    "WeightedBatchTopKTrainingSAE",
    "WeightedBatchTopKTrainingSAEConfig",
    "WeightedJumpReLUTrainingSAE",
    "WeightedJumpReLUTrainingSAEConfig",
    "WeightedMatryoshkaBatchTopKTrainingSAE",
    "WeightedMatryoshkaBatchTopKTrainingSAEConfig",
    "WeightedStandardTrainingSAE",
    "WeightedStandardTrainingSAEConfig",
    "WeightedTopKTrainingSAE",
    "WeightedTopKTrainingSAEConfig",
    "register",
]


def register() -> list[str]:
    """Make the weighted architectures known to SAELens, once; their names there.

    Raises LlmWsaeError if SAELens is not installed.
    """
    if importlib.util.find_spec("sae_lens") is None:
        raise LlmWsaeError(
            "the weighted training classes are SAELens' with another loss, and SAELens is not "
            "installed here; install sae-lens"
        )
    training = importlib.import_module(f"{__name__}.training")
    return training.ARCHITECTURES


def __getattr__(name: str) -> Any:
    """Import a class when it is first named (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    return getattr(importlib.import_module(f"{__name__}.training"), name)
