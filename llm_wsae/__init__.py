"""Weighted sparse autoencoders for the residual streams of real language models.

The names in ``__all__`` are the public Python interface. They are imported when first used, so
that ``import llm_wsae`` stays light (no torch). ``TYPE_CHECKING`` shows them to editors.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_wsae.attaching.attachment import attach
    from llm_wsae.attaching.edits import Ablate, Clamp, Scale, Steer
    from llm_wsae.data.config import HarvestConfig, StreamConfig
    from llm_wsae.data.corpus import Corpus
    from llm_wsae.data.harvesting import harvest
    from llm_wsae.data.store import ActivationStore
    from llm_wsae.data.stores import open_stores
    from llm_wsae.data.streaming import ActivationStream, ActivationStreams
    from llm_wsae.dictionary.dictionary import Dictionary, load_pretrained
    from llm_wsae.errors import LlmWsaeError, UsageError
    from llm_wsae.evaluation.config import EvaluateConfig, MonosemanticConfig
    from llm_wsae.evaluation.fidelity.evaluator import evaluate
    from llm_wsae.explaining.explaining import explain
    from llm_wsae.explaining.protocol import ExplainConfig
    from llm_wsae.inspecting.inspection import inspect
    from llm_wsae.lab.planting.config import PlantConfig
    from llm_wsae.lab.planting.recovery import measure_recovery
    from llm_wsae.lab.planting.source import PlantedSource
    from llm_wsae.lab.studies.config import Study, StudyGrid
    from llm_wsae.lab.studies.runner import study
    from llm_wsae.lab.theory.optimum import gap_norms, least_gap_weights
    from llm_wsae.model.language_model import LanguageModel
    from llm_wsae.model.site import Site
    from llm_wsae.pages.dashboard import dashboard
    from llm_wsae.pages.neuronpedia import export_neuronpedia
    from llm_wsae.pipeline.planning import plan
    from llm_wsae.pipeline.request import ModelConfig, Run, RunGrid, TextConfig
    from llm_wsae.pipeline.run import run
    from llm_wsae.sparse.codes import Codes
    from llm_wsae.statistics.moments import Statistics
    from llm_wsae.training.arm import ArmConfig, make_arms
    from llm_wsae.training.config import TrainConfig
    from llm_wsae.training.trainer import train, train_sites
    from llm_wsae.weights.choosing import choose_weights, weights_from_rule
    from llm_wsae.weights.loss_weights import LossWeights
    from llm_wsae.weights.rules import RULES, Rule
    from llm_wsae.weights.weighing import measure_inputs

    __version__: str

_HOMES = {
    "LanguageModel": "model.language_model",
    "Site": "model.site",
    "Corpus": "data.corpus",
    "HarvestConfig": "data.config",
    "ActivationStore": "data.store",
    "open_stores": "data.stores",
    "StreamConfig": "data.config",
    "ActivationStream": "data.streaming",
    "ActivationStreams": "data.streaming",
    "Statistics": "statistics.moments",
    "RULES": "weights.rules",
    "Rule": "weights.rules",
    "LossWeights": "weights.loss_weights",
    "measure_inputs": "weights.weighing",
    "choose_weights": "weights.choosing",
    "weights_from_rule": "weights.choosing",
    "TrainConfig": "training.config",
    "ArmConfig": "training.arm",
    "make_arms": "training.arm",
    "Dictionary": "dictionary.dictionary",
    "load_pretrained": "dictionary.dictionary",
    "attach": "attaching.attachment",
    "Ablate": "attaching.edits",
    "Clamp": "attaching.edits",
    "Scale": "attaching.edits",
    "Steer": "attaching.edits",
    "Codes": "sparse.codes",
    "inspect": "inspecting.inspection",
    "dashboard": "pages.dashboard",
    "explain": "explaining.explaining",
    "ExplainConfig": "explaining.protocol",
    "export_neuronpedia": "pages.neuronpedia",
    "EvaluateConfig": "evaluation.config",
    "MonosemanticConfig": "evaluation.config",
    "LlmWsaeError": "errors",
    "UsageError": "errors",
    "harvest": "data.harvesting",
    "train": "training.trainer",
    "train_sites": "training.trainer",
    "evaluate": "evaluation.fidelity.evaluator",
    "ModelConfig": "pipeline.request",
    "TextConfig": "pipeline.request",
    "RunGrid": "pipeline.request",
    "Run": "pipeline.request",
    "run": "pipeline.run",
    "plan": "pipeline.planning",
    "PlantConfig": "lab.planting.config",
    "PlantedSource": "lab.planting.source",
    "measure_recovery": "lab.planting.recovery",
    "Study": "lab.studies.config",
    "StudyGrid": "lab.studies.config",
    "study": "lab.studies.runner",
    "gap_norms": "lab.theory.optimum",
    "least_gap_weights": "lab.theory.optimum",
}

__all__ = [
    "RULES",
    "Ablate",
    "ActivationStore",
    "ActivationStream",
    "ActivationStreams",
    "ArmConfig",
    "Clamp",
    "Codes",
    "Corpus",
    "Dictionary",
    "EvaluateConfig",
    "ExplainConfig",
    "HarvestConfig",
    "LanguageModel",
    "LlmWsaeError",
    "LossWeights",
    "ModelConfig",
    "MonosemanticConfig",
    "PlantConfig",
    "PlantedSource",
    "Rule",
    "Run",
    "RunGrid",
    "Scale",
    "Site",
    "Statistics",
    "Steer",
    "StreamConfig",
    "Study",
    "StudyGrid",
    "TextConfig",
    "TrainConfig",
    "UsageError",
    "__version__",
    "attach",
    "choose_weights",
    "dashboard",
    "evaluate",
    "explain",
    "export_neuronpedia",
    "gap_norms",
    "harvest",
    "inspect",
    "least_gap_weights",
    "load_pretrained",
    "make_arms",
    "measure_inputs",
    "measure_recovery",
    "open_stores",
    "plan",
    "run",
    "study",
    "train",
    "train_sites",
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
