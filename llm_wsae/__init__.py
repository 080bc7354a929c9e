"""Weighted sparse autoencoders for the residual streams of real language models.

The names in ``__all__`` are the public Python interface. Each is imported when it is first used, so
that ``import llm_wsae`` stays light (no torch). Type checkers and editors run the imports below;
at run time they are read, as the list of names and their modules.
"""

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_wsae.attaching import Ablate as Ablate
    from llm_wsae.attaching import Clamp as Clamp
    from llm_wsae.attaching import Scale as Scale
    from llm_wsae.attaching import Steer as Steer
    from llm_wsae.attaching import attach as attach
    from llm_wsae.data.config import HarvestConfig as HarvestConfig
    from llm_wsae.data.config import StreamConfig as StreamConfig
    from llm_wsae.data.corpus import Corpus as Corpus
    from llm_wsae.data.harvesting import harvest as harvest
    from llm_wsae.data.rows import ActivationSource as ActivationSource
    from llm_wsae.data.rows import ArrayRows as ArrayRows
    from llm_wsae.data.store import ActivationStore as ActivationStore
    from llm_wsae.data.store import open_stores as open_stores
    from llm_wsae.data.streaming import ActivationStream as ActivationStream
    from llm_wsae.data.streaming import ActivationStreams as ActivationStreams
    from llm_wsae.dictionary.dictionary import Dictionary as Dictionary
    from llm_wsae.dictionary.dictionary import load_pretrained as load_pretrained
    from llm_wsae.errors import LlmWsaeError as LlmWsaeError
    from llm_wsae.errors import UsageError as UsageError
    from llm_wsae.evaluation.config import EvaluateConfig as EvaluateConfig
    from llm_wsae.evaluation.config import MonosemanticConfig as MonosemanticConfig
    from llm_wsae.evaluation.fidelity.evaluator import evaluate as evaluate
    from llm_wsae.explaining.explaining import explain as explain
    from llm_wsae.explaining.protocol import ExplainConfig as ExplainConfig
    from llm_wsae.inspecting.inspection import inspect as inspect
    from llm_wsae.lab.config import PlantConfig as PlantConfig
    from llm_wsae.lab.config import Study as Study
    from llm_wsae.lab.config import StudyGrid as StudyGrid
    from llm_wsae.lab.config import UpstreamConfig as UpstreamConfig
    from llm_wsae.lab.planting import PlantedSource as PlantedSource
    from llm_wsae.lab.planting import measure_recovery as measure_recovery
    from llm_wsae.lab.studies.runner import study as study
    from llm_wsae.lab.theory import gap_matrix as gap_matrix
    from llm_wsae.lab.theory import least_gap_weights as least_gap_weights
    from llm_wsae.lab.upstream import plant_upstream as plant_upstream
    from llm_wsae.model.language_model import LanguageModel as LanguageModel
    from llm_wsae.model.site import Site as Site
    from llm_wsae.pages.dashboard import dashboard as dashboard
    from llm_wsae.pages.neuronpedia import export_neuronpedia as export_neuronpedia
    from llm_wsae.pipeline.planning import plan as plan
    from llm_wsae.pipeline.request import ModelConfig as ModelConfig
    from llm_wsae.pipeline.request import Run as Run
    from llm_wsae.pipeline.request import RunGrid as RunGrid
    from llm_wsae.pipeline.request import TextConfig as TextConfig
    from llm_wsae.pipeline.run import run as run
    from llm_wsae.sparse.codes import Codes as Codes
    from llm_wsae.statistics.moments import Statistics as Statistics
    from llm_wsae.steering import steer as steer
    from llm_wsae.training.arm import ArmConfig as ArmConfig
    from llm_wsae.training.arm import make_arms as make_arms
    from llm_wsae.training.config import TrainConfig as TrainConfig
    from llm_wsae.training.trainer import train as train
    from llm_wsae.training.trainer import train_sites as train_sites
    from llm_wsae.weights.loss_weights import LossWeights as LossWeights
    from llm_wsae.weights.loss_weights import choose_weights as choose_weights
    from llm_wsae.weights.loss_weights import weights_from_rule as weights_from_rule
    from llm_wsae.weights.rules import RULES as RULES
    from llm_wsae.weights.rules import Rule as Rule
    from llm_wsae.weights.weighing import measure_inputs as measure_inputs

    __version__: str

_HOMES = {
    alias.name: str(node.module)
    for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    if isinstance(node, ast.ImportFrom) and str(node.module).startswith("llm_wsae.")
    for alias in node.names
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("llm-wsae")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
