"""Options that commands share, in groups: the same name, default and help text everywhere.

A command takes a group as one parameter. ``Flat`` puts its options on the command itself
(``--revision``), ``Prefixed`` under the parameter's name (``--train.batch-size``). The groups of
settings are the package's own configurations, with short spellings added here. Below them is what
commands share beyond their options: the type of a result, checks of names, the cost.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from llm_wsae.data.config import HELDOUT, HarvestConfig, StreamConfig
from llm_wsae.errors import UsageError
from llm_wsae.evaluation.config import EvaluateConfig, MonosemanticConfig
from llm_wsae.lab.planting.config import PlantConfig
from llm_wsae.machine.processes import join, leads
from llm_wsae.model.site import Site
from llm_wsae.outside import check_numbers
from llm_wsae.terminal import printable
from llm_wsae.training.config import BESIDE_BASELINES, ArchitectureName, TrainConfig

if TYPE_CHECKING:
    from llm_wsae.data.corpus import Corpus
    from llm_wsae.model.language_model import LanguageModel

T = TypeVar("T")
Prefixed = Annotated[T, tyro.conf.FlagConversionOff]  # a yes or no is spelt out: --x.y False
Flat = Annotated[T, tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]  # an option without a value: --private
Stores = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="STORE…")]
RepoId = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REPO_ID")]
Part = Literal["train", "heldout", "all"]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How the language model is loaded."""

    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""
    device: Literal["auto", "cuda", "mps", "cpu", "spread"] = "auto"
    """Device to compute on. spread: all of them, memory and disk."""
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the model.
    auto: that of the store or stream, if there is one; otherwise the faster one, which is measured
    on a CPU."""

    def load(self, model: str, recorded: Mapping[str, Any] | None = None) -> "LanguageModel":
        """Load a model, and say so on stderr. ``recorded`` is what the record of the rows that it
        made, if there are some, says of it: their number format is kept."""
        from llm_wsae.machine.hardware import choose_device
        from llm_wsae.machine.number_format import fast_dtype, name_of
        from llm_wsae.model.language_model import LanguageModel

        note(f"loading {model}")
        dtype: str = self.model_dtype
        if dtype == "auto":
            place = choose_device("auto" if self.device == "spread" else self.device)
            began = recorded.get("dtype") if isinstance(recorded, dict) else None
            processes = join()
            with processes.together():
                dtype = processes.lead(lambda: name_of(fast_dtype(place, "model", began)))
        return LanguageModel.load(model, revision=self.revision, device=self.device, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class _ModelName:
    model: str
    """Hub id, local folder or .gguf file of a causal language model."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(LoadOptions, _ModelName):  # fields of the last base come first
    """The language model."""


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """The text."""

    corpus: str
    """Hub dataset (name:config@revision), .txt/.jsonl/.parquet file or folder, or text package;
    several are joined by +."""
    text_column: str | None = None
    """Column that holds the text, if that is not clear."""
    heldout_fraction: float = HELDOUT
    """Share of documents held out of training."""

    def open(self, part: Part) -> "Corpus":
        """The text."""
        from llm_wsae.data.corpus import Corpus

        return Corpus.open(self.corpus, part, self.heldout_fraction, self.text_column)


@dataclass(frozen=True, kw_only=True)
class StreamOptions(StreamConfig, LoadOptions):
    """Instead of a store: a model and a text, whose rows are trained on as they are computed."""

    model: str | None = None
    """Hub id, local folder or .gguf file of a causal language model."""
    corpus: str | None = None
    """Hub dataset (name:config@revision), .txt/.jsonl/.parquet file or folder, or text package;
    several are joined by +."""
    text_column: str | None = None
    """Column that holds the text, if that is not clear."""
    heldout_fraction: float = HELDOUT
    """Share of documents held out of training."""
    device: tyro.conf.Suppress[str] = "auto"  # type: ignore[assignment]  # that of the training

    def check_source(self, stores: tuple[Path, ...]) -> None:
        """Raises UsageError unless there is a store, or else both a model and a text."""
        if not stores:
            if self.model is None or self.corpus is None:
                raise UsageError(
                    "give a STORE to train on, or --model and --corpus to train without one"
                )
        elif self != StreamOptions():
            given, store = changed_options(self)[0], stores[0]
            raise UsageError(f"{given} is for training without a store; drop it, or drop {store}")

    @property
    def config(self) -> StreamConfig:
        """How rows are made, without from what."""
        return StreamConfig(**{one.name: getattr(self, one.name) for one in fields(StreamConfig)})


@dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """Which dictionaries to train."""

    rule: tuple[str, ...] = ("uniform",)
    """Weight rules; uniform is the plain dictionary."""
    alpha: tuple[float, ...] = (0.5,)
    """Exponents of the weights γ = score^α, for every rule except uniform."""
    k: tuple[int, ...] = (32,)
    """Active latents per token."""

    def __post_init__(self) -> None:
        check_numbers(self, k=1)


@dataclass(frozen=True, kw_only=True)
class GridOptions(RuleOptions):
    """Which dictionaries to train: one for every combination."""

    architecture: tuple[ArchitectureName, ...] = ("topk",)
    """Architectures: topk has k active latents on every token, batch-topk, matryoshka and jumprelu
    k on average; gba: at most k; relu: set by --l1. The frozen ones are topk baselines that
    leave one half random; where there are plain weights, they have these alone."""
    l1: tuple[float, ...] = ()
    """L1 coefficients, each of a ReLU dictionary, which ignores k."""
    init_seeds: tuple[int, ...] = (0,)
    """Seeds of the initial parameters."""


@dataclass(frozen=True, kw_only=True)
class AutoGridOptions(GridOptions):
    """Which dictionaries to train: one for every combination."""

    rule: tuple[str, ...] = ("uniform", "variance", "whitening")
    architecture: tuple[ArchitectureName, ...] = BESIDE_BASELINES
    alpha: tuple[Literal["auto"] | float, ...] = (0.5,)  # type: ignore[assignment]
    """Exponents of the weights γ = score^α, for every rule except uniform.
    auto: whitening's is chosen by short trainings, and the numbers are for the other rules."""


class _Prefixed:
    """Settings under a prefix: what is wrong with them is said of that prefix."""

    prefix = ""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()  # type: ignore[misc]
        except UsageError as error:
            raise UsageError(f"--{self.prefix}: {error}") from None


@dataclass(frozen=True)
class HarvestOptions(_Prefixed, HarvestConfig):
    """How activations are harvested."""

    prefix = "harvest"
    tokens: Annotated[int, tyro.conf.arg(aliases=["--tokens"])] = HarvestConfig.tokens


@dataclass(frozen=True)
class TrainOptions(_Prefixed, TrainConfig):
    """How dictionaries are trained."""

    prefix = "train"
    device: str = TrainConfig.device
    """Device to train on: cuda, mps, cpu or auto, which is that of the model."""

    def with_model_on(self, device: str) -> TrainConfig:
        """The training next to a model on ``device``."""
        fits = self.device == "auto" and device != "spread"
        return replace(self, device=device) if fits else self


@dataclass(frozen=True)
class EvaluateOptions(_Prefixed, EvaluateConfig):
    """How fidelity is measured."""

    prefix = "evaluate"
    tokens: Annotated[int, tyro.conf.arg(aliases=["--eval-tokens"])] = EvaluateConfig.tokens


@dataclass(frozen=True)
class ScoreOptions(_Prefixed, MonosemanticConfig):
    """How monosemanticity is measured."""

    prefix = "score"


@dataclass(frozen=True)
class PlantOptions(_Prefixed, PlantConfig):
    """Which features are planted."""

    prefix = "planted"


@dataclass(frozen=True)
class ScoreOptionsOfEvaluate(ScoreOptions):
    """How monosemanticity is measured, with the resamplings and the seed of fidelity."""

    bootstraps: tyro.conf.Suppress[int] = MonosemanticConfig.bootstraps
    seed: tyro.conf.Suppress[int] = MonosemanticConfig.seed


def stream_config(
    stream: bool, buffer_tokens: int, statistics_tokens: int, harvest: HarvestConfig
) -> StreamConfig | None:
    """How rows are streamed, if they are. Raises UsageError for settings of one without it."""
    packing = {**harvest.packing(), "batch_tokens": harvest.batch_tokens}
    config = StreamConfig(
        **packing, buffer_tokens=buffer_tokens, statistics_tokens=statistics_tokens
    )
    if not stream and config != StreamConfig(**packing):
        raise UsageError("--buffer-tokens and --statistics-tokens are for --stream; add it")
    return config if stream else None


def changed_options(options: Any, prefix: str = "") -> list[str]:
    """The options of a group that do not have their defaults."""
    return [
        f"--{prefix}{field.name.replace('_', '-')}"
        for field in fields(options)
        if getattr(options, field.name) != field.default
    ]


def check_none_given(prefix: str, options: Any, needed: str) -> None:
    """Raises UsageError for options of what is not done without the one that is ``needed``."""
    if given := changed_options(options, f"{prefix}."):
        raise UsageError(f"{' and '.join(given)}: only with {needed}; add that")


Result = tuple[dict[str, Any], str]  # the JSON object, the text for people


def note(text: str) -> None:
    """One line on stderr, however many processes there are."""
    if leads():
        print(printable(text), file=sys.stderr, flush=True)


def sites_of(names: tuple[str, ...]) -> list[Site]:
    """The sites of their names. Raises UsageError if there is none or one is misspelt."""
    if not names:
        raise UsageError("name at least one site, e.g. --site blocks.8.hook_resid_post")
    return [Site.parse(name) for name in names]


def cost(started: float) -> str:
    """Time since ``started`` (a ``time.monotonic``) and peak memory, in words."""
    from llm_wsae.machine.hardware import peak_memory_bytes

    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    peak = peak_memory_bytes() / 2**30
    return f"took {minutes} min {seconds:02} s, peak memory {peak:.1f} GiB"
