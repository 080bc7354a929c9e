"""What a study is asked for. Free of torch, for the command line."""

# ruff: noqa: RUF009 - the defaults are frozen

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llm_wsae.errors import UsageError
from llm_wsae.evaluation.config import EvaluateConfig, MonosemanticConfig
from llm_wsae.lab.planting.config import PlantConfig
from llm_wsae.pipeline.request import (
    Evaluation,
    Flag,
    Flat,
    ModelConfig,
    RuleGrid,
    Spelt,
    Stores,
    TextConfig,
    Training,
    check_none_given,
    named,
)
from llm_wsae.training.config import ArchitectureName, TrainConfig
from llm_wsae.weights.config import WeightConfig


@dataclass(frozen=True, kw_only=True)
class StudyGrid(RuleGrid):
    """Which dictionaries to compare; each rule brings its control."""

    rule: tuple[str, ...] = ("variance",)
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds, each of initial parameters, order of the rows, and controls at once."""
    architecture: ArchitectureName = "topk"
    """Architecture: topk has k active latents on every token, others k on average, gba fewer; the
    frozen ones are topk baselines that leave one half random."""
    keep_dictionaries: bool = True
    """Keep the dictionaries; otherwise each is deleted as soon as it is measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.seeds)) < 2:
            raise UsageError(
                "a study needs at least 2 different seeds, not "
                f"{', '.join(map(str, self.seeds)) or 'none'}: one allows no interval"
            )
        if self.architecture == "relu":
            raise UsageError(
                "a study compares dictionaries of the same k, which relu does not have; choose "
                "another architecture"
            )
        for name in ("rule", "alpha", "k"):
            if not getattr(self, name):
                raise UsageError(f"a study needs at least one {name}")


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that ``study`` is asked for."""

    stores: Stores
    """Activation stores, of one model with the same sites and settings."""
    site: str
    """One of their sites."""
    out: Path
    """Folder of the study."""
    dictionary: Path | None = None
    """First dictionary of the site, for the rule participation. Without it, one is trained for each
    seed."""
    plant: Flag = False
    """Plant known features into the rows, and measure how much of them is recovered."""
    model: Flat[ModelConfig]
    corpus: Flat[TextConfig]
    compare: Flat[StudyGrid] = StudyGrid()
    weigh: Flat[WeightConfig] = WeightConfig()
    train: Training = TrainConfig()
    evaluate: Evaluation = EvaluateConfig()
    score: Annotated[MonosemanticConfig, named("score", MonosemanticConfig), Spelt] = (
        MonosemanticConfig()
    )
    planted: Annotated[PlantConfig, named("planted", PlantConfig), Spelt] = PlantConfig()

    def __post_init__(self) -> None:
        if not self.plant:
            check_none_given("planted", self.planted, "--plant")
        if self.weigh.draw:
            raise UsageError(
                f"draw is {self.weigh.draw}, but a study draws its controls again for every seed; "
                "leave it 0"
            )
