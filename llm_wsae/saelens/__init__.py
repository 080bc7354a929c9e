"""Loss weights for SAELens' own training: its classes, with ‖Γ(x − x̂)‖² in place of ‖x − x̂‖².

    from llm_wsae.saelens import WeightedTopKTrainingSAEConfig

    sae = WeightedTopKTrainingSAEConfig(
        d_in=576, d_sae=4608, k=32, weights_file="weights.safetensors"
    )
    LanguageModelSAETrainingRunner(LanguageModelSAERunnerConfig(sae=sae, ...)).run()

``llm-wsae weigh`` writes the file. Importing a class registers all of them with SAELens (as
``wsae_topk`` and so on), so that its runner, trainer, checkpoints and command line know them;
``register`` does so without importing one. SAELens finally saves a dictionary of one of its
ordinary architectures, which ``Dictionary.load`` reads together with the rule.

SAELens is imported only then: importing this module does not need it.
"""

import importlib
import importlib.util
from typing import Any

from llm_wsae.errors import LlmWsaeError

_KINDS = ("BatchTopK", "JumpReLU", "MatryoshkaBatchTopK", "Standard", "TopK")
__all__ = ["register"]
__all__ += [f"Weighted{kind}TrainingSAE" for kind in _KINDS]
__all__ += [f"Weighted{kind}TrainingSAEConfig" for kind in _KINDS]


def register() -> list[str]:
    """Register the weighted architectures with SAELens, once. Returns their names there.

    Raises LlmWsaeError if SAELens is not installed.
    """
    if importlib.util.find_spec("sae_lens") is None:
        raise LlmWsaeError(
            "the weighted training classes extend those of SAELens, which is not installed; "
            "install sae-lens"
        )
    training = importlib.import_module(f"{__name__}.training")
    return training.ARCHITECTURES


def __getattr__(name: str) -> Any:
    """Import a class when it is first named (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    return getattr(importlib.import_module(f"{__name__}.training"), name)
