"""Weighted sparse autoencoders for the residual streams of real language models.

The names in ``__all__`` are the public Python interface. They are imported when first used, so
that ``import llm_wsae`` stays light (no torch). ``TYPE_CHECKING`` shows them to editors.

The four stages are functions with the name of the module or package they live in, and
``llm_wsae.harvest`` can only be one of the two, whatever was imported before. It is the module;
import the functions from there::

    from llm_wsae.harvest import harvest
    from llm_wsae.train.trainer import train
    from llm_wsae.evaluate.fidelity import evaluate
    from llm_wsae.run import run
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_wsae.attaching.attach import attach
    from llm_wsae.attaching.edits import Ablate, Clamp, Scale, Steer
    from llm_wsae.data.config import HarvestConfig, StreamConfig
    from llm_wsae.data.corpus import Corpus
    from llm_wsae.data.store import ActivationStore
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.dictionary.pretrained import load_pretrained
    from llm_wsae.errors import LlmWsaeError, UsageError
    from llm_wsae.evaluate.config import EvaluateConfig
    from llm_wsae.evaluate.monosemantic_config import MonosemanticConfig
    from llm_wsae.harvest import ActivationStream
    from llm_wsae.model.language_model import LanguageModel
    from llm_wsae.model.site import Site
    from llm_wsae.sparse.codes import Codes
    from llm_wsae.statistics.moments import Statistics
    from llm_wsae.statistics.monosemanticity import RULES
    from llm_wsae.statistics.weights import LossWeights, weights_from_rule
    from llm_wsae.train.arm import ArmConfig
    from llm_wsae.train.arms import choose_weights, make_arms
    from llm_wsae.train.config import TrainConfig

    __version__: str

_HOMES = {
    "LanguageModel": "model.language_model",
    "Site": "model.site",
    "Corpus": "data.corpus",
    "HarvestConfig": "data.config",
    "ActivationStore": "data.store",
    "StreamConfig": "data.config",
    "ActivationStream": "harvest",
    "Statistics": "statistics.moments",
    "RULES": "statistics.monosemanticity",
    "LossWeights": "statistics.weights",
    "weights_from_rule": "statistics.weights",
    "TrainConfig": "train.config",
    "ArmConfig": "train.arm",
    "choose_weights": "train.arms",
    "make_arms": "train.arms",
    "Dictionary": "dictionary.dictionary",
    "load_pretrained": "dictionary.pretrained",
    "attach": "attaching.attach",
    "Ablate": "attaching.edits",
    "Clamp": "attaching.edits",
    "Scale": "attaching.edits",
    "Steer": "attaching.edits",
    "Codes": "sparse.codes",
    "EvaluateConfig": "evaluate.config",
    "MonosemanticConfig": "evaluate.monosemantic_config",
    "LlmWsaeError": "errors",
    "UsageError": "errors",
}

__all__ = [
    "RULES",
    "Ablate",
    "ActivationStore",
    "ActivationStream",
    "ArmConfig",
    "Clamp",
    "Codes",
    "Corpus",
    "Dictionary",
    "EvaluateConfig",
    "HarvestConfig",
    "LanguageModel",
    "LlmWsaeError",
    "LossWeights",
    "MonosemanticConfig",
    "Scale",
    "Site",
    "Statistics",
    "Steer",
    "StreamConfig",
    "TrainConfig",
    "UsageError",
    "__version__",
    "attach",
    "choose_weights",
    "load_pretrained",
    "make_arms",
    "weights_from_rule",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value = version("llm-wsae")
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
