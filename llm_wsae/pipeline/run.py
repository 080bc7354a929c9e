"""The whole job in one call: harvest → weigh → train → evaluate → save, into one folder.

A store keeps the rows on the disk. A stream computes them while they are trained on, once for all
sites, and keeps none. The same call after an interruption resumes: finished stages are read back.
"""

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from llm_wsae.artifact.files import write_json
from llm_wsae.data.harvesting import harvest
from llm_wsae.data.manifest import MANIFEST, Manifest
from llm_wsae.data.packing import Packer
from llm_wsae.data.site_rows import SiteRows
from llm_wsae.data.streaming import ActivationStreams
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.folder import keep_measurements
from llm_wsae.errors import UsageError
from llm_wsae.evaluation.baselines import RAW, half_random_beside, with_raw_dimensions
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.evaluation.fidelity.report import Report
from llm_wsae.evaluation.heldout import Context, take_contexts
from llm_wsae.machine.processes import join, leads
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.pipeline.planning import plan
from llm_wsae.pipeline.plots import plot_fidelity, plot_profile, write_page
from llm_wsae.pipeline.request import RUN_RECORD, Run, write_request
from llm_wsae.pipeline.site_weights import (
    CHOICE,
    TRIAL_TOKENS,
    choose_alpha,
    stand_ins,
    weights_of,
)
from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.checkpoint import check_same_rows, recorded, training_in
from llm_wsae.training.log import LOG
from llm_wsae.training.trainer import check_arms, check_out, check_room, train_sites
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.profile import profile, profile_text
from llm_wsae.weights.weighing import measure_inputs

STORE = "store"
PAGE = "report.html"
TRIAL_K = 32  # of the trials behind an automatic α and of the raw dimensions, if none is asked for


@dataclass(frozen=True)
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


def run(request: Run, model: LanguageModel | None = None) -> dict[Site, SiteResult]:
    """Train a plain and weighted dictionaries on a model's activations, and measure them.

    The folder receives ``store/`` and, per site, ``profile.json``, ``profile.png``, one dictionary
    folder per arm, ``report.json``, ``fidelity.png``, and ``report.html``, which shows them. The
    training part of the corpus is harvested, its held-out part evaluated on, once for all sites. If
    one of several sites cannot be evaluated, the others' reports are written before its error is
    raised. With ``request.stream`` there is no store: all sites are trained in step, and weights
    come from the first tokens of the text. First, a table on stderr says what the run takes
    (``plan``). ``model`` is one that is loaded already.

    Under ``torchrun`` all processes make the same call. They harvest and train together, as
    ``harvest`` and ``train`` say; rank 0 alone plans (for one process), judges the trials of an
    exponent, evaluates and writes, and the others return ``{}``.

    Raises what its stages raise; a request that cannot be met is refused before the harvest.
    """
    model = model or request.model.load(_model_begun(request))
    stages, processes = _Stages(request, model), join()
    with processes.together():  # no process looks at the folder when another has begun to write
        stages.check()
        # before hours of work are built on too little text
        heldout, trial = stages.texts()
        processes.lead(stages.announce)
    rows = stages.rows()
    weighed = {site: stages.weigh(rows, site, trial) for site in request.sites}
    trained = stages.train(rows, {site: one.arms for site, one in weighed.items()})
    with processes.together():
        if not processes.leads:
            return {}
        results = stages.finish(weighed, trained, heldout)
        write_request(request.folder / RUN_RECORD, "run", request, model=model.name)
    return results


def _model_begun(request: Run) -> dict[str, Any] | None:
    """What the records in a run's folder say of the model; None if nothing was begun there."""
    out = request.folder
    if (out / STORE / MANIFEST).is_file():
        return Manifest.load(out / STORE).model
    trainings = (recorded(out / str(site)) for site in request.sites)
    return next((found["rows"].get("model") for found in trainings if found is not None), None)


class _Weighed(NamedTuple):
    """What was measured of a site, and the dictionaries that are to be trained there."""

    statistics: Statistics
    profile: dict[str, Any]
    weights: list[LossWeights]
    arms: list[ArmConfig]


class _Stages:
    """The stages of one run."""

    def __init__(self, request: Run, model: LanguageModel):
        self.request, self.model, self.out = request, model, request.folder
        self.k = request.grid.k[0] if request.grid.k else TRIAL_K

    @functools.cached_property
    def begun(self) -> list[Site]:
        """The sites of which something was trained, or the exponent was chosen."""
        folders = {site: self.out / str(site) for site in self.request.sites}
        return [
            site
            for site, folder in folders.items()
            if training_in(folder).is_begun() or (folder / CHOICE).exists()
        ]

    @functools.cached_property
    def has_store(self) -> bool:
        """Whether a harvest was begun."""
        return (self.out / STORE / MANIFEST).is_file()

    def check(self) -> None:
        """Refuse, before hours of harvesting, what cannot be trained; and a folder with trainings
        on fewer rows, or on a store where a stream is asked for, or the other way round."""
        request, out, training = self.request, self.out, self.request.training
        d_in = self.model.d_model
        arms = request.grid.arms(stand_ins(request.grid, request.weigh, d_in))
        check_arms(arms, d_in, training)
        if not self.begun:
            parts = join().size if training.shard == "latents" else 1
            check_room([d_in] * len(arms), training, parts)
        if request.stream:
            check_out(out)
        elif self.begun and self.has_store:
            there = Manifest.load(out / STORE)
            if request.harvest.num_contexts > there.num_contexts:
                raise UsageError(
                    f"{out} holds a training of {self.begun[0]} on "
                    f"{there.num_contexts * there.context_size:,} tokens; choose another folder "
                    "for more"
                )
        for site in request.sites:
            found = recorded(out / str(site))
            if found is not None and (found["rows"].get("kind") == "stream") != request.stream:
                made, change = ("store", "omit") if request.stream else ("stream", "add")
                raise UsageError(
                    f"{out} holds a training of {site} on a {made}; {change} --stream to resume "
                    "it, or choose another folder"
                )

    def texts(self) -> tuple[list[Context], list[Context]]:
        """The held-out text, and other text on which α is chosen, if it is."""
        heldout = self.request.corpus.open("heldout")
        contexts = iter(Packer.for_model(self.model, self.request.harvest).contexts(heldout))
        own = take_contexts(contexts, self.request.evaluate.tokens)
        return own, take_contexts(contexts, TRIAL_TOKENS) if self.request.grid.is_automatic else []

    def announce(self) -> None:
        """Say what the run takes, when it begins."""
        if not self.begun and not self.has_store:
            takes = plan(self.request, self.model)
            shortage = takes.shortage()
            _write(takes.table() + (f"\nwarning: {shortage}" if shortage else ""))

    def rows(self) -> SiteRows:
        """Harvest, or prepare the stream."""
        request, name = self.request, self.model.name
        text, corpus = request.corpus.open("train"), request.corpus.corpus
        if request.streaming is None:
            tokens = f"{request.harvest.tokens:,} tokens"
            _say(1, "harvest", f"{tokens} of {corpus} through {name}")
            return harvest(self.model, text, request.sites, self.out / STORE, request.harvest)
        _say(1, "harvest", f"none: {corpus} goes through {name} while it is trained on")
        streams = ActivationStreams(self.model, text, request.sites, request.streaming, self.out)
        for site in request.sites:
            check_same_rows(self.out / str(site), streams.identity(site))
        return streams

    def weigh(self, rows: SiteRows, site: Site, trial: list[Context]) -> _Weighed:
        """Measure a site, choose its weights, and show its profile."""
        _say(2, "weigh", f"profile of {site}")
        grid, config = self.request.grid, self.request.weigh
        inputs = measure_inputs(grid.rules, rows, site, model=self.model)
        chosen = None
        if trial:
            trials = replace(self.request.evaluate, tokens=TRIAL_TOKENS)
            judge = FidelityEvaluator(self.model, trial, trials)
            source, folder = rows.source(site), self.out / str(site)
            training = self.request.training
            choice = choose_alpha(inputs, source, judge, folder, self.k, training, config)
            chosen = choice.alpha
            _write(choice.text())
        weights = weights_of(inputs, grid, config, chosen=chosen)
        facts = profile(inputs.statistics, weights)
        _write(profile_text(facts))
        return _Weighed(inputs.statistics, facts, weights, grid.arms(weights))

    def train(
        self, rows: SiteRows, arms: Mapping[Site, Sequence[ArmConfig]]
    ) -> dict[Site, dict[str, Dictionary]]:
        """All dictionaries of a site in one pass over its rows; of a stream, those of all sites."""
        trained: dict[Site, dict[str, Dictionary]] = {}
        for group in [arms] if rows.in_step else [{site: arms[site]} for site in arms]:
            number = sum(map(len, group.values()))
            where = f"{len(group)} sites" if len(group) > 1 else next(iter(group))
            _say(3, "train", f"{number} dictionaries of {where} in one pass")
            trained |= train_sites(rows, group, self.request.training, self.out)
        return trained

    def finish(
        self,
        weighed: Mapping[Site, _Weighed],
        trained: Mapping[Site, dict[str, Dictionary]],
        heldout: Sequence[Context],
    ) -> dict[Site, SiteResult]:
        """Evaluate, and write everything that is not a dictionary: only now, so that a run which is
        refused leaves what a folder says of its dictionaries."""
        for site, one in weighed.items():
            folder = self.out / str(site)
            write_json(folder / "profile.json", one.profile)
            plot_profile(one.statistics, one.weights, str(site), folder / "profile.png")
        places = ", ".join(map(str, self.request.sites))
        _say(4, "evaluate", f"{places} on {self.request.evaluate.tokens:,} held-out tokens")
        results: dict[Site, SiteResult] = {}
        evaluator = FidelityEvaluator(self.model, heldout, self.request.evaluate)
        measured = {
            site: with_raw_dimensions(own, weighed[site].statistics, float(self.k))
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
        dictionary.info = replace(dictionary.info, metrics=metrics)


def _say(number: int, stage: str, what: str) -> None:
    _write(f"[{number}/4] {stage}: {what}")


def _write(text: str) -> None:
    if leads():
        tqdm.write(text, file=sys.stderr)
