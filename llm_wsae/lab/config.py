"""What the laboratory is asked for. Free of torch, for the command line."""

# ruff: noqa: RUF009 - the defaults are frozen

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llm_wsae.errors import UsageError
from llm_wsae.evaluation.config import EvaluateConfig, MonosemanticConfig
from llm_wsae.model.site import Site
from llm_wsae.outside import SHARE, check_numbers
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
    check_some,
    named,
)
from llm_wsae.training.config import ArchitectureName, TrainConfig
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.rules import Rule

_LEAST = 1e-6  # of a strength or a probability: float32 rounds away what is less


@dataclass(frozen=True)
class PlantConfig:
    """Features to plant: the same number in every stratum of directions at every strength."""

    seed: int = 0
    """Seed of the directions and of how often and when features fire."""
    per_cell: int = 16
    """Features of each stratum at each strength."""
    strengths: tuple[float, ...] = (0.12, 0.2, 0.35)
    """Mean strengths, in median norms of the centred rows."""
    rarest: float = 3e-4
    """Smallest probability that a feature fires on a row; probabilities are log-uniform."""
    commonest: float = 1e-2
    """Largest probability that a feature fires on a row."""
    token_share: float = 0.25
    """Share of the features that fire on one token only, on half of its occurrences at random."""
    natural: bool = False
    """Also plant along the stream's own directions: Σ^¼g, Σ^½g, and means of tokens."""
    heldout_share: float = 0.15
    """Share of the store's rows, its last ones, that are not trained on: recovery is measured
    there. At least 2,048 rows are held out."""

    def __post_init__(self) -> None:
        check_numbers(self, per_cell=(1, 10_000))
        _check_plants(self)
        if not 0 <= self.token_share <= 1 or not 0 < self.heldout_share < 1:
            raise UsageError("token-share must be from 0 to 1, heldout-share between 0 and 1")


def _check_plants(config: "PlantConfig | UpstreamConfig") -> None:
    if not config.strengths or not _LEAST <= min(config.strengths) <= max(config.strengths) <= 1:
        raise UsageError(
            f"strengths must be at least {_LEAST:g}, or a plant is lost in rounding, and at "
            "most 1, the median norm of the rows, or it would drown the stream; not "
            f"{', '.join(map(str, config.strengths)) or 'none'}"
        )
    if not _LEAST <= config.rarest <= config.commonest < 1:
        raise UsageError(
            f"plants fire with probabilities from {config.rarest:g} to {config.commonest:g}; these "
            f"must rise, be at least {_LEAST:g} and less than 1"
        )


@dataclass(frozen=True)
class UpstreamConfig:
    """Features to plant into the stream after an early block."""

    seed: int = 0
    """Seed of the directions and of how often and when features fire."""
    block: int = 1
    """The block after which they are planted."""
    per_strength: int = 32
    """Features of each strength."""
    strengths: tuple[float, ...] = (0.3, 0.6, 1.0)
    """Mean strengths, in median norms of the centred stream there."""
    rarest: float = 1e-3
    """Smallest probability that a feature fires on a token; probabilities are log-uniform."""
    commonest: float = 1e-2
    """Largest probability that a feature fires on a token."""
    heldout_tokens: int = 200_000
    """Tokens of held-out text on which features are looked for."""

    def __post_init__(self) -> None:
        check_numbers(self, block=0, per_strength=(1, 10_000), heldout_tokens=1)
        _check_plants(self)


def check_reached(site: Site, planted: Site) -> None:
    """Raises UsageError for a site that features planted at another do not reach."""
    if site <= planted:
        raise UsageError(
            f"features are planted at {planted} and do not reach {site}; take a later site, or "
            "plant after an earlier block"
        )


@dataclass(frozen=True)
class TheoryConfig:
    """Settings of the toy experiment: 200 features in 20 dimensions, 200 latents."""

    sparsity: tuple[float, ...] = (0.9, 0.95, 0.99)
    """Probabilities that a feature is 0. A toy model is trained at each, and dictionaries on it."""
    rule: tuple[str, ...] = ("uniform", "variance", "whitening")
    """Weight rules, as in `train`; uniform is the plain SAE."""
    alpha: float = 0.5
    """Exponent of the weights."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the toy model, the rows and the initial weights, which all rules share."""
    steps: int = 2000
    """Steps of each dictionary, of 256 rows; its toy model takes three quarters as many, of 512."""

    def __post_init__(self) -> None:
        check_numbers(self, sparsity=SHARE, steps=(1, 10**6))
        if max(self.sparsity, default=0) == 1:
            raise UsageError("at a sparsity of 1 there is no feature to find; take a lower one")
        if not (self.sparsity and self.rule and self.seeds):
            raise UsageError("name at least one sparsity, one rule and one seed")
        for name in self.rule:
            if Rule.parse(name).need not in (None, "second_moment"):
                raise UsageError(
                    f"the toy experiment cannot measure what the rule {name} reads; take a rule "
                    "that reads the rows alone, like variance or whitening"
                )


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
    """A dictionary of the site, which the rule participation needs."""
    plant: Flag = False
    """Plant known features into the rows, and measure how much of them is recovered."""
    plant_upstream: Flag = False
    """Plant known features after an early block, let the model carry them to the site, and measure
    how much of them is recovered. The text is harvested again, with them."""
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
    upstream: Annotated[UpstreamConfig, named("upstream", UpstreamConfig), Spelt] = UpstreamConfig()

    def __post_init__(self) -> None:
        check_some(self.stores, "activation store")
        if Site.parse(self.site).is_mlp:
            raise UsageError(f"a study compares autoencoders; {self.site} is that of transcoders")
        for rule in self.compare.rules:
            rule.form(self.weigh)
            if rule.need == "dictionary" and self.dictionary is None:
                raise UsageError(
                    "the rule participation needs a first dictionary of the site; train a plain "
                    "one on other seeds, and name its folder with --dictionary"
                )
        if not self.plant:
            check_none_given("planted", self.planted, "--plant")
        if not self.plant_upstream:
            check_none_given("upstream", self.upstream, "--plant-upstream")
        elif self.plant:
            raise UsageError("--plant and --plant-upstream are two studies; give one of them")
        else:
            check_reached(Site.parse(self.site), Site(self.upstream.block, "post"))
        if self.weigh.draw:
            raise UsageError(
                f"draw is {self.weigh.draw}, but a study draws its controls again for every seed; "
                "leave it 0"
            )
