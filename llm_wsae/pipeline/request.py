"""What a job is asked for: one frozen dataclass, which is the command line, the argument in Python,
and the record beside the output.

It is made of the small configurations that its parts own. Nothing here needs torch, so that help is
quick.
"""

# ruff: noqa: RUF009 - the defaults are frozen

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from llm_wsae.artifact.files import read_own_json
from llm_wsae.artifact.provenance import write_record
from llm_wsae.data.config import HELDOUT, HarvestConfig, StreamConfig
from llm_wsae.errors import UsageError, shown
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.machine.processes import join, leads
from llm_wsae.model.site import Site, sites_of
from llm_wsae.outside import check_numbers, local_path, mapping
from llm_wsae.terminal import printable
from llm_wsae.training.config import (
    BESIDE_BASELINES,
    ArchitectureName,
    TrainConfig,
    check_skip,
)
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.rules import Rule

if TYPE_CHECKING:
    from llm_wsae.data.corpus import Corpus
    from llm_wsae.model.language_model import LanguageModel
    from llm_wsae.training.arm import ArmConfig
    from llm_wsae.weights.loss_weights import LossWeights
    from llm_wsae.weights.scoring import RuleInputs

T = TypeVar("T")
Spelt = tyro.conf.FlagConversionOff  # a yes or no is spelt out: --x.y False
Flat = Annotated[T, tyro.conf.OmitArgPrefixes, Spelt]  # its options stand on the command itself
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]  # an option without a value: --private
Stores = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="STORE…")]
Part = Literal["train", "heldout", "all"]
RUN_RECORD = "run.json"


def named(prefix: str, config: type, **notes: Any) -> type:
    """A class for the annotation of a field, which makes the configuration from its options, and
    whose errors name their prefix. ``notes`` are tyro's, about single options."""

    def make(cls: type, **settings: Any) -> Any:
        try:
            return config(**settings)
        except UsageError as error:
            raise UsageError(f"--{prefix}: {error}") from None

    types = {name: Annotated[config.__annotations__[name], about] for name, about in notes.items()}
    body = {"__doc__": config.__doc__, "__new__": make, "__annotations__": types}
    return dataclass(frozen=True)(type(config.__name__, (config,), body))


def note(text: str) -> None:
    """One line on stderr, however many processes there are."""
    if leads():
        print(printable(text), file=sys.stderr, flush=True)


Training = Annotated[TrainConfig, named("train", TrainConfig), Spelt]
Evaluation = Annotated[
    EvaluateConfig,
    named("evaluate", EvaluateConfig, tokens=tyro.conf.arg(aliases=["--eval-tokens"])),
    Spelt,
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model."""

    model: str
    """Hub id, local folder or .gguf file of a causal language model."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""
    device: Literal["auto", "cuda", "mps", "cpu", "spread"] = "auto"
    """Device to compute on. spread divides the model among all devices, memory and disk."""
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the model.
    auto: that of the store or stream, if there is one; otherwise the faster one, which is measured
    on a CPU."""

    def load(self, recorded: Mapping[str, Any] | None = None) -> "LanguageModel":
        """Load the model, and say so on stderr; in the number format of the rows that it made, if
        its identity in their record is ``recorded``."""
        from llm_wsae.machine.hardware import choose_device, fast_dtype, name_of
        from llm_wsae.model.language_model import LanguageModel

        note(f"loading {self.model}")
        dtype: str = self.model_dtype
        if dtype == "auto":
            place = choose_device("auto" if self.device == "spread" else self.device)
            began = None if recorded is None else recorded.get("dtype")
            processes = join()
            with processes.together():
                dtype = processes.lead(lambda: name_of(fast_dtype(place, "model", began)))
        return LanguageModel.load(
            self.model, revision=self.revision, device=self.device, dtype=dtype
        )


@dataclass(frozen=True, kw_only=True)
class OptionalModelConfig(ModelConfig):
    """The language model, where it may be omitted."""

    model: str | None = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text."""

    corpus: str
    """Hub dataset (name:config@revision), .txt/.jsonl/.parquet file or folder, or text package;
    several are joined by +."""
    text_column: str | None = None
    """Column that holds the text, if that is not clear."""
    heldout_fraction: float = HELDOUT
    """Share of documents held out of training."""

    def open(self, part: Part) -> "Corpus":
        """The documents of a part. Raises as ``Corpus.open`` does."""
        from llm_wsae.data.corpus import Corpus

        return Corpus.open(self.corpus, part, self.heldout_fraction, self.text_column)


@dataclass(frozen=True, kw_only=True)
class OptionalTextConfig(TextConfig):
    """The text, where something else may stand in for it."""

    corpus: str | None = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class RuleGrid:
    """Rules × exponents × k."""

    rule: tuple[str, ...] = ("uniform",)
    """Weight rules; uniform is the plain dictionary."""
    alpha: tuple[float, ...] = (0.5,)
    """Exponents of the weights γ = score^α, for every rule except uniform."""
    k: tuple[int, ...] = (32,)
    """Active latents per token."""

    def __post_init__(self) -> None:
        check_numbers(self, k=1)

    @cached_property
    def rules(self) -> list[Rule]:
        """The rules by their names. Raises UsageError for one that does not exist."""
        return [Rule.parse(name) for name in self.rule]


@dataclass(frozen=True, kw_only=True)
class Grid(RuleGrid):
    """Which dictionaries to train: one for every combination."""

    architecture: tuple[ArchitectureName, ...] = ("topk",)
    """Architectures: topk has k active latents on every token, batch-topk, matryoshka and jumprelu
    k on average; gba: at most k; relu: set by --l1. The frozen ones are topk baselines whose
    encoder or decoder stays random; they have plain weights alone, if those are among the rules."""
    l1: tuple[float, ...] = ()
    """L1 coefficients. Each gives a ReLU dictionary, to which k does not apply."""
    init_seeds: tuple[int, ...] = (0,)
    """Seeds of the initial parameters."""

    def weights(
        self,
        inputs: "RuleInputs",
        config: WeightConfig,
        chosen: float | None = None,
        own: "LossWeights | None" = None,
    ) -> "list[LossWeights]":
        """The weights of a site, those from a file (``own``) last; the plain ones if there are no
        others. ``chosen`` is the exponent that trials found. Raises as ``choose_weights`` does."""
        from llm_wsae.weights.loss_weights import choose_weights

        found = []
        for rule in self.rules:
            found += choose_weights(inputs, [rule], self.exponents(rule, chosen), config=config)
        if own is not None or not found:
            found += choose_weights(inputs, [] if own else ["uniform"], [], own, config)
        return list({weights.name: weights for weights in found}.values())

    def arms(self, weights: "Sequence[LossWeights]") -> "list[ArmConfig]":
        """Every combination with these weights. Raises as ``make_arms`` does."""
        from llm_wsae.training.arm import make_arms

        return make_arms(weights, self.k, self.l1, self.init_seeds, self.architecture)

    def likely_arms(
        self, config: WeightConfig, d_in: int, own: "LossWeights | None" = None
    ) -> "list[ArmConfig]":
        """Arms with the names and forms of those that will be trained, before anything is measured:
        no two weights are alike, but their values mean nothing."""
        import torch

        from llm_wsae.weights.loss_weights import LossWeights

        found: dict[str, LossWeights] = {}
        for rule in self.rules:
            for alpha in (1.0,) if rule.is_plain else self.exponents(rule, chosen=0.5):
                gamma = torch.eye(d_in) if rule.form(config) == "matrix" else torch.ones(d_in)
                gamma = gamma * (1 + len(found) / 1000)
                weights = LossWeights(gamma, rule, alpha, rule.settings(config))
                found.setdefault(weights.name, weights)
        return self.arms([*found.values(), *([own] if own else [])])

    @property
    def is_automatic(self) -> bool:
        """Whether short trainings choose an exponent."""
        return "auto" in self.alpha

    def exponents(self, rule: Rule, chosen: float | None) -> list[float]:
        """Those of a rule, where the trials chose one, or that none is worth it (None)."""
        if self.is_automatic and rule.has_automatic_alpha:
            return [] if chosen is None else [chosen]
        return [alpha for alpha in self.alpha if alpha != "auto"]

    def check(self, weigh: WeightConfig) -> None:
        """Refuse a rule without its form, input or exponent, and an automatic α for none."""
        for rule in self.rules:
            if rule.need == "dictionary":  # there is none yet
                raise rule.missing_input()
            rule.form(weigh)
        if self.is_automatic and not any(rule.has_automatic_alpha for rule in self.rules):
            raise UsageError(
                "an alpha of auto is chosen for whitening, which is not among the rules; add it, "
                "or give numbers"
            )
        for rule in self.rules:
            if not rule.is_plain and not self.exponents(rule, chosen=1.0):
                raise UsageError(
                    f"the rule {rule.name!r} needs an alpha that is a number, next to auto for "
                    "whitening: --alpha auto 0.5"
                )


@dataclass(frozen=True, kw_only=True)
class RunGrid(Grid):
    """Which dictionaries to train: one for every combination."""

    rule: tuple[str, ...] = ("uniform", "variance", "whitening")
    architecture: tuple[ArchitectureName, ...] = BESIDE_BASELINES
    alpha: tuple[Literal["auto"] | float, ...] = (0.5,)  # type: ignore[assignment]
    """Exponents of the weights γ = score^α, for every rule except uniform.
    auto: whitening's is chosen by short trainings, and the numbers are for the other rules."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that ``run`` and ``plan`` are asked for."""

    site: tuple[str, ...]
    """Sites, named as in TransformerLens: blocks.8.hook_resid_post. A whole MLP, blocks.8.mlp, is
    that of a transcoder; 'blocks.*.mlp' names every block's."""
    out: Path | None = None
    """Folder that receives everything; by default runs/NAME for a model owner/NAME."""
    stream: Flag = False
    """Keep no rows on the disk; train on them as the model computes them."""
    buffer_tokens: int = StreamConfig.buffer_tokens
    """With --stream: tokens whose rows are shuffled together."""
    statistics_tokens: int = StreamConfig.statistics_tokens
    """With --stream: tokens at the beginning of the text that weights are measured on."""
    model: Flat[ModelConfig]
    corpus: Flat[TextConfig]
    grid: Flat[RunGrid] = RunGrid()
    weigh: Flat[WeightConfig] = WeightConfig()
    harvest: Annotated[
        HarvestConfig,
        named("harvest", HarvestConfig, tokens=tyro.conf.arg(aliases=["--tokens"])),
        Spelt,
    ] = HarvestConfig()
    train: Training = TrainConfig()
    evaluate: Evaluation = EvaluateConfig()

    def __post_init__(self) -> None:
        idle = {"--buffer-tokens", "--statistics-tokens"} & changed(self).keys()
        if self.streaming is None and idle:
            raise UsageError("--buffer-tokens and --statistics-tokens are for --stream; add it")
        if self.training.tokens is None and self.harvest.tokens < self.train.batch_size:
            raise UsageError(
                f"{self.harvest.tokens:,} tokens are less than one batch of "
                f"{self.train.batch_size:,}; harvest more"
            )
        check_skip(sites_of(self.site), self.train)
        self.grid.check(self.weigh)

    @property
    def sites(self) -> list[Site]:
        """The sites of their names, each once; of a pattern, only once a model is known."""
        return sites_of(self.site)

    def of_model(self, model: "LanguageModel") -> "Run":
        """The request with the sites of its patterns. Raises UsageError for a site that the model
        lacks."""
        sites = sites_of(self.site, model.num_blocks)
        for site in sites:
            model.check_site(site)
        return replace(self, site=tuple(map(str, sites)))

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        name = local_path(self.model.model, "model").resolve().name.removesuffix(".gguf")
        return Path("runs") / name if self.out is None else self.out

    @property
    def streaming(self) -> StreamConfig | None:
        """How rows are streamed, if they are."""
        if not self.stream:
            return None
        return StreamConfig(
            **self.harvest.packing(),
            batch_tokens=self.harvest.batch_tokens,
            buffer_tokens=self.buffer_tokens,
            statistics_tokens=self.statistics_tokens,
        )

    @property
    def rows(self) -> int:
        """Rows that a harvest gives at each site, at most."""
        per_context = self.harvest.context_size - self.harvest.drop_positions
        return self.harvest.num_contexts * per_context

    @property
    def training(self) -> TrainConfig:
        """On the model's device; on a stream, as many rows as would have been harvested."""
        beside = train_beside(self.train, self.model)
        return replace(beside, tokens=beside.tokens or self.rows) if self.stream else beside


def train_beside(training: TrainConfig, model: ModelConfig) -> TrainConfig:
    """The training next to a model: on its device, unless it is told otherwise."""
    fits = training.device == "auto" and model.device != "spread"
    return replace(training, device=model.device) if fits else training


def write_request(path: Path, command: str, request: Any, **known: Any) -> None:
    """Write the options of a request beside its output, without that place. ``known`` replaces
    options by what they turned out to be."""
    found: dict[str, Any] = {}
    for field in fields(request):
        value, notes = getattr(request, field.name), getattr(field.type, "__metadata__", ())
        is_flat = is_dataclass(value) and tyro.conf.OmitArgPrefixes in notes
        found |= _options(value) if is_flat else {field.name: value}
    found.pop("out", None)
    write_record(path, command, found | known)


def _options(config: Any) -> dict[str, Any]:
    """The fields that are options, with their values."""
    notes = {field.name: getattr(field.type, "__metadata__", ()) for field in fields(config)}
    shown = [name for name, own in notes.items() if tyro.conf.Suppress not in own]
    return {name: getattr(config, name) for name in shown}


def read_request(path: Path, command: str) -> dict[str, Any]:
    """The options that ``write_request`` wrote, under the names of the command line. Raises
    LlmWsaeError for a damaged file, UsageError for the record of another command."""
    record = read_own_json(path, "record", "give its options on the command line")
    if record.get("command") != command:
        made_by = shown(record.get("command"))
        raise UsageError(f"{path} is not a record of {command}, but of {made_by}")
    found: dict[str, Any] = {}
    for name, value in mapping(record.get("config")).items():
        parts = {f"{name}.{own}": one for own, one in mapping(value).items()} or {name: value}
        found |= {f"--{key.replace('_', '-')}": one for key, one in parts.items()}
    return {option: value for option, value in found.items() if value is not None}


def changed(options: Any, kind: type | None = None, prefix: str = "") -> dict[str, str]:
    """The options that do not have their defaults, with their values; of ``kind``'s fields only."""
    return {
        f"--{prefix}{field.name.replace('_', '-')}": str(getattr(options, field.name))
        for field in fields(kind or options)
        if getattr(options, field.name) != field.default
    }


def words_of(options: Any, kind: type | None = None) -> list[str]:
    """The same, as one would type them."""
    return [word for pair in changed(options, kind).items() for word in pair]


def check_some(paths: Sequence[Path], what: str) -> None:
    """Raises UsageError for none at all, which the parser lets through."""
    if not paths:
        raise UsageError(f"name at least one {what}")


def check_none_given(prefix: str, options: Any, needed: str) -> None:
    """Raises UsageError for options of what is not done without the one that is ``needed``."""
    if given := changed(options, prefix=f"{prefix}."):
        raise UsageError(f"{' and '.join(given)}: only with {needed}; add that")
