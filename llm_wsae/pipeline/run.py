"""The whole job in one call: harvest → weigh → train → evaluate → save, into one folder.

A store keeps the rows on the disk. A stream computes them while they are trained on, once for all
sites, and keeps none.

The same call after an interruption resumes it: finished stages are read back.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from llm_wsae.artifact.files import write_json
from llm_wsae.data.config import HELDOUT, HarvestConfig, StreamConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.harvesting import harvest
from llm_wsae.data.manifest import MANIFEST
from llm_wsae.data.packing import Packer
from llm_wsae.data.store import ActivationStore
from llm_wsae.data.streaming import ActivationStreams
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.folder import keep_measurements
from llm_wsae.evaluation.activations import Context, check_scored, take_contexts
from llm_wsae.evaluation.baselines import RAW, half_random_beside, with_raw_dimensions
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.evaluation.fidelity.report import Report
from llm_wsae.machine.processes import join, leads
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.pipeline.checks import (
    STORE,
    Alphas,
    begun,
    check_alphas,
    check_not_trained_on_less,
    check_trained_alike,
)
from llm_wsae.pipeline.planning import check_rows, plan, stand_ins
from llm_wsae.pipeline.plots import plot_fidelity, plot_profile, write_page
from llm_wsae.pipeline.tuning import TRIAL_TOKENS, AlphaChoice, choose_alpha
from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.arm import ArmConfig, make_arms
from llm_wsae.training.checkpoint import check_same_rows
from llm_wsae.training.config import BESIDE_BASELINES, ArchitectureName, TrainConfig
from llm_wsae.training.log import LOG
from llm_wsae.training.trainer import check_arms, check_out, check_room, train, train_sites
from llm_wsae.weights.choosing import choose_weights
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.profile import profile, profile_text
from llm_wsae.weights.rules import RULES, Rule
from llm_wsae.weights.weighing import measure_inputs, measure_stream_inputs

PAGE = "report.html"
TRIAL_K = 32  # of the trials behind an automatic α and of the raw dimensions, if none is asked for


@dataclasses.dataclass(frozen=True)
class SiteResult:
    """What a run made for one site."""

    profile: dict[str, Any]
    dictionaries: dict[str, Dictionary]
    report: Report
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        """The folder and what was measured, JSON-able."""
        return {
            "folder": str(self.folder),
            "profile": self.profile,
            "fidelity": self.report.summaries(),
        }

    def text(self) -> str:
        """The table for people, and the paths of what was written."""
        paths = {
            "page": [PAGE],
            "figures": ["profile.png", "fidelity.png"],
            "numbers": ["profile.json", "report.json", LOG],
            "dictionaries": list(self.dictionaries),
        }
        lines = [
            f"{'' if number else what:<14}{self.folder / name}"
            for what, names in paths.items()
            for number, name in enumerate(names)
        ]
        return "\n".join([self.report.table(), "", *lines])


def run(
    model: LanguageModel,
    corpus: str,
    sites: Sequence[Site],
    out: Path,
    *,
    rules: Sequence[str] = ("uniform", "variance", "whitening"),
    alphas: Alphas = (0.5,),
    ks: Sequence[int] = (32,),
    l1s: Sequence[float] = (),
    architectures: Sequence[ArchitectureName] = BESIDE_BASELINES,
    init_seeds: Sequence[int] = (0,),
    text_column: str | None = None,
    heldout_fraction: float = HELDOUT,
    harvest_config: HarvestConfig = HarvestConfig(),  # noqa: B008 - frozen
    stream_config: StreamConfig | None = None,
    weight_config: WeightConfig = WeightConfig(),  # noqa: B008 - frozen
    train_config: TrainConfig = TrainConfig(),  # noqa: B008 - frozen
    evaluate_config: EvaluateConfig = EvaluateConfig(),  # noqa: B008 - frozen
) -> dict[Site, SiteResult]:
    """Train a plain and weighted dictionaries on a model's activations, and measure them.

    ``out`` receives ``store/`` and, per site, ``profile.json``, ``profile.png``, one dictionary
    folder per arm, ``report.json``, ``fidelity.png``, and ``report.html``, which shows them. The
    training part of the corpus is harvested; its held-out part is used for the evaluation, which
    reads it once for all sites and then writes their reports. If one of several sites cannot be
    evaluated, the others' reports are written before its error is raised.
    With a ``stream_config`` there is no store: all sites are trained in step, on the rows of as
    many tokens as would have been harvested, or on ``train_config.tokens`` rows, and weights come
    from the first tokens of the text.
    Before the harvest, a table on stderr says what the run takes (``plan``).
    ``rules`` × ``alphas`` × (``ks`` × ``architectures`` and ``l1s``) × ``init_seeds`` are the arms.
    With ``"auto"`` among the alphas, whitening's is chosen by short trainings
    (``tuning.choose_alpha``), and the numbers are for the other rules.

    Under ``torchrun`` all processes make the same call. They harvest and train together, as
    ``harvest`` and ``train`` say; rank 0 alone says what the run takes, which is what it would take
    in one process, judges the trials of an exponent, evaluates and writes. The others wait for it
    and return ``{}``.

    Raises what its stages raise; a request that cannot be met is refused before the harvest.
    """
    if stream_config is not None and train_config.tokens is None:
        per_context = harvest_config.context_size - harvest_config.drop_positions
        train_config = replace(train_config, tokens=harvest_config.num_contexts * per_context)
    processes = join()
    with processes.together():  # no process looks at the folder when another has begun to write
        asked = _Run(
            model=model,
            corpus=corpus,
            text_column=text_column,
            heldout_fraction=heldout_fraction,
            sites=list(dict.fromkeys(sites)),
            out=out,
            rules=[Rule.parse(rule) for rule in rules],
            alphas=alphas,
            ks=ks,
            l1s=l1s,
            architectures=architectures,
            init_seeds=init_seeds,
            harvesting=harvest_config,
            stream=stream_config,
            weighing=weight_config,
            training=train_config,
            evaluating=evaluate_config,
        )
        asked.check()
        # before hours of work are built on too little text
        heldout, trial = asked.texts()
        processes.lead(asked.announce)
    rows = asked.rows()
    weighed = {site: asked.weigh(rows, site, trial) for site in asked.sites}
    trained = asked.train(rows, {site: one.arms for site, one in weighed.items()})
    with processes.together():
        return asked.finish(weighed, trained, heldout) if processes.leads else {}


class _Weighed(NamedTuple):
    """What was measured of a site, and the dictionaries that are to be trained there."""

    statistics: Statistics
    profile: dict[str, Any]
    weights: list[LossWeights]
    arms: list[ArmConfig]


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a run was asked for; its methods are the stages."""

    model: LanguageModel
    corpus: str
    text_column: str | None
    heldout_fraction: float
    sites: list[Site]
    out: Path
    rules: list[Rule]
    alphas: Alphas
    ks: Sequence[int]
    l1s: Sequence[float]
    architectures: Sequence[ArchitectureName]
    init_seeds: Sequence[int]
    harvesting: HarvestConfig
    stream: StreamConfig | None
    weighing: WeightConfig
    training: TrainConfig
    evaluating: EvaluateConfig

    def check(self) -> None:
        """Refuse what cannot be, and to go on in a folder with what is of other rows."""
        for rule in self.rules:
            if rule.need == "dictionary":  # there is none yet
                raise rule.missing_input()
            rule.form(self.weighing)
        check_alphas(self.rules, self.alphas)
        d_in, parts = self.model.d_model, join().size if self.training.shard == "latents" else 1
        plain = LossWeights(torch.ones(d_in), RULES["uniform"])
        check_arms(arms := self._arms([plain] if self.rules else []), d_in, self.training)
        if not begun(self.out, self.sites):  # every rule has as many arms, or more
            check_room([d_in] * len(arms), self.training, parts)
        check_rows(self.harvesting, self.training)
        if self.stream is None:
            check_not_trained_on_less(self.out, self.sites, self.harvesting)
        else:
            check_out(self.out)
        check_trained_alike(self.out, self.sites, self.stream is not None)

    def texts(self) -> tuple[list[Context], list[Context]]:
        """The held-out text, and other text on which α is chosen, if it is."""
        heldout = self._text("heldout")
        contexts = iter(Packer.for_model(self.model, self.harvesting).contexts(heldout))
        own = take_contexts(contexts, self.evaluating.tokens)
        check_scored(own)
        return own, take_contexts(contexts, TRIAL_TOKENS) if "auto" in self.alphas else []

    def announce(self) -> None:
        """Say what the run takes, when it begins."""
        if begun(self.out, self.sites) or (self.out / STORE / MANIFEST).is_file():
            return
        names = [rule.name for rule in self.rules]
        weights = stand_ins(names, self.alphas, self.model.d_model, self.weighing)
        takes = plan(
            self.model,
            self._text("train"),
            self.sites,
            self._arms(weights),
            self.out,
            harvest_config=self.harvesting,
            stream_config=self.stream,
            train_config=self.training,
            evaluate_config=self.evaluating,
        )
        shortage = takes.shortage()
        _write(takes.table() + (f"\nwarning: {shortage}" if shortage else ""))

    def rows(self) -> ActivationStore | ActivationStreams:
        """Harvest, or prepare the stream."""
        text = self._text("train")
        name = self.model.name
        if self.stream is None:
            tokens = f"{self.harvesting.tokens:,} tokens"
            _say(1, "harvest", f"{tokens} of {self.corpus} through {name}")
            return harvest(self.model, text, self.sites, self.out / STORE, self.harvesting)
        _say(1, "harvest", f"none: {self.corpus} goes through {name} while it is trained on")
        streams = ActivationStreams(self.model, text, self.sites, self.stream, self.out)
        for site in self.sites:
            check_same_rows(self.out / str(site), streams.identity(site))
        return streams

    def weigh(
        self, rows: ActivationStore | ActivationStreams, site: Site, trial: list[Context]
    ) -> _Weighed:
        """Measure a site, choose its weights, and show its profile."""
        _say(2, "weigh", f"profile of {site}")
        inputs = (
            measure_inputs(self.rules, rows, site, model=self.model)
            if isinstance(rows, ActivationStore)
            else measure_stream_inputs(self.rules, rows, site)
        )
        choice = None
        if trial:
            trials = replace(self.evaluating, tokens=TRIAL_TOKENS)
            choice = choose_alpha(
                inputs,
                rows.source(site),
                FidelityEvaluator(self.model, trial, trials),
                self.out / str(site),
                k=self.ks[0] if self.ks else TRIAL_K,
                training=self.training,
                config=self.weighing,
            )
            _write(choice.text())
        weights = _weights(inputs, self.rules, self.alphas, choice, self.weighing)
        facts = profile(inputs.statistics, weights)
        _write(profile_text(facts))
        return _Weighed(inputs.statistics, facts, weights, self._arms(weights))

    def train(
        self,
        rows: ActivationStore | ActivationStreams,
        arms: Mapping[Site, Sequence[ArmConfig]],
    ) -> dict[Site, dict[str, Dictionary]]:
        """All dictionaries of a site in one pass over its rows; of a stream, those of all sites."""
        if isinstance(rows, ActivationStreams):
            number = sum(map(len, arms.values()))
            _say(3, "train", f"{number} dictionaries of {len(arms)} sites in one pass")
            return train_sites(rows, arms, self.training, self.out)
        trained = {}
        for site, own in arms.items():
            _say(3, "train", f"{len(own)} dictionaries of {site} in one pass")
            trained[site] = train(rows.source(site), own, self.training, self.out / str(site))
        return trained

    def finish(
        self,
        weighed: Mapping[Site, _Weighed],
        trained: Mapping[Site, dict[str, Dictionary]],
        heldout: Sequence[Context],
    ) -> dict[Site, SiteResult]:
        """Evaluate, and write everything that is not a dictionary: not before, so that a run which
        is refused leaves what a folder says of the dictionaries that are there."""
        for site, one in weighed.items():
            folder = self.out / str(site)
            write_json(folder / "profile.json", one.profile)
            plot_profile(one.statistics, one.weights, str(site), folder / "profile.png")
        places = ", ".join(map(str, self.sites))
        _say(4, "evaluate", f"{places} on {self.evaluating.tokens:,} held-out tokens")
        results: dict[Site, SiteResult] = {}
        evaluator = FidelityEvaluator(self.model, heldout, self.evaluating)
        k = float(self.ks[0] if self.ks else TRIAL_K)
        measured = {
            site: with_raw_dimensions(own, weighed[site].statistics, k)
            for site, own in trained.items()
        }
        for site, report in evaluator.evaluate_sites(measured):
            folder, dictionaries = self.out / str(site), trained[site]
            _save_metrics(folder, dictionaries, report)
            report.write(folder / "report.json")
            of_trained = {name: report.summaries()[name] for name in dictionaries}
            plot_fidelity(of_trained, str(site), folder / "fidelity.png")
            write_page(report, weighed[site].arms, str(site), folder / PAGE)
            results[site] = SiteResult(weighed[site].profile, dictionaries, report, folder)
        return results

    def _text(self, part: str) -> Corpus:
        return Corpus.open(self.corpus, part, self.heldout_fraction, self.text_column)

    def _arms(self, weights: Sequence[LossWeights]) -> list[ArmConfig]:
        return make_arms(weights, self.ks, self.l1s, self.init_seeds, self.architectures)


def _weights(
    inputs: RuleInputs,
    rules: Sequence[Rule],
    alphas: Alphas,
    choice: AlphaChoice | None,
    config: WeightConfig,
) -> list[LossWeights]:
    """The weights of a site: whitening's by the choice, if there was one."""
    numbers = [float(alpha) for alpha in alphas if alpha != "auto"]
    found: dict[str, LossWeights] = {}
    for rule in rules:
        own = numbers
        if choice is not None and rule.has_automatic_alpha:
            own = [] if choice.alpha is None else [choice.alpha]
        found |= {w.name: w for w in choose_weights(inputs, [rule], own, config=config)}
    if not found:  # whitening alone, and it is not worth it
        found = {w.name: w for w in choose_weights(inputs, [RULES["uniform"]], [])}
    return list(found.values())


def _save_metrics(folder: Path, dictionaries: Mapping[str, Dictionary], report: Report) -> None:
    """Store each dictionary's measurements in its own folder, so that they travel with it, and
    those of the baselines beside it."""
    summaries = report.summaries()
    for name, dictionary in dictionaries.items():
        beside = {RAW: RAW} | half_random_beside(dictionary, dictionaries)
        baselines = {label: {"fidelity": summaries[other]} for label, other in beside.items()}
        found = {"fidelity": summaries[name], "baselines": baselines}
        keep_measurements(folder / name, found)
        metrics = {**dictionary.info.metrics, **found}
        dictionary.info = dataclasses.replace(dictionary.info, metrics=metrics)


def _say(number: int, stage: str, what: str) -> None:
    _write(f"[{number}/4] {stage}: {what}")


def _write(text: str) -> None:
    if leads():
        tqdm.write(text, file=sys.stderr)
