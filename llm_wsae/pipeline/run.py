"""The whole job in one call: harvest → weigh → train → evaluate → save, into one folder.

A store keeps the rows on the disk. A stream computes them while they are trained on, once for all
sites, and keeps none. The same call after an interruption resumes: finished stages are read back.
Short trainings can choose how far to whiten (``--alpha auto``), by the KL divergence of the model's
predictions when it computes with the reconstruction.
"""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from llm_wsae.artifact.artifact import Artifact, Record
from llm_wsae.artifact.files import write_json
from llm_wsae.artifact.provenance import plain
from llm_wsae.data.harvesting import harvest
from llm_wsae.data.packing import Packer
from llm_wsae.data.rows import ActivationSource, SiteRows
from llm_wsae.data.store import MANIFEST, Manifest
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
from llm_wsae.pipeline.plots import plot_profile, write_page
from llm_wsae.pipeline.request import RUN_RECORD, Run, write_request
from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.checkpoint import check_same_rows, recorded, training_in
from llm_wsae.training.config import PROCEDURAL
from llm_wsae.training.trainer import (
    check_arms,
    check_out,
    check_room,
    train,
    train_sites,
)
from llm_wsae.weights.loss_weights import LossWeights, weights_from_rule
from llm_wsae.weights.profile import profile, profile_text
from llm_wsae.weights.rules import Rule
from llm_wsae.weights.scoring import RuleInputs
from llm_wsae.weights.weighing import measure_inputs

STORE = "store"
PAGE = "report.html"
TOGETHER = "all-blocks.json"  # of transcoders: the model with all of these MLPs replaced
_TRIALS = ".alpha"
CANDIDATES = (0.25, 0.5, 0.75, 1.0)
TRIAL_ROWS = 300_000  # of each trial training: about 40 seconds for all five on two cores
TRIAL_TOKENS = 10_000  # held out, on which trials are judged, of about 40 documents or more
LEAST_GAIN = 0.02  # share by which KL must fall below the plain trial's; less may be chance
_TRIAL_K = 32  # of the trials and of the raw dimensions, if no k is asked for


@dataclass(frozen=True)
class SiteResult:
    """What a run made for one site."""

    profile: dict[str, Any]
    dictionaries: dict[str, Dictionary]
    report: Report
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        """The folder and what was measured, JSON-able."""
        measured = {"profile": self.profile, "fidelity": self.report.summaries()}
        return {"folder": str(self.folder), **measured}

    def text(self) -> str:
        """The table for people, and where the rest is."""
        rest = "dictionaries, profile, numbers and log beside it"
        return f"{self.report.table()}\n\nreport  {self.folder / PAGE}; {rest}"


def run(request: Run, model: LanguageModel | None = None) -> dict[Site, SiteResult]:
    """Train a plain and weighted dictionaries on a model's activations, and measure them.

    The folder receives ``store/`` and, per site, ``profile.json``, ``profile.png``, one dictionary
    folder per arm, ``report.json``, and ``report.html``, which shows it. If one of several sites
    cannot be evaluated, the others' reports are written before its error is raised. With
    ``request.stream`` there is no store: all sites are trained in step, and weights come from the
    first tokens of the text. First, a table on stderr says what the run takes (``plan``). ``model``
    is one that is loaded already.

    Under ``torchrun`` all processes make the same call. They harvest and train together; rank 0
    alone plans (for one process), judges trials, evaluates and writes; the others return ``{}``.
    Raises what its stages raise; a request that cannot be met is refused before the harvest.
    """
    model = model or request.model.load(_model_begun(request))
    request, processes = request.of_model(model), join()
    with processes.together():  # no process looks at the folder when another has begun to write
        is_begun = _check(request, model)
        # before hours of work are built on too little text
        heldout, trial = _texts(request, model)
        if not is_begun:
            takes = processes.lead(lambda: plan(request, model))
            shortage = takes.shortage()
            _write(takes.table() + (f"\nwarning: {shortage}" if shortage else ""))
    rows = _rows(request, model)
    sites = {site: _weigh(request, model, rows, site, trial) for site in request.sites}
    trained = _train(request, model, rows, {site: one.arms for site, one in sites.items()})
    with processes.together():
        if not processes.leads:
            return {}
        evaluator = FidelityEvaluator(model, heldout, request.evaluate)
        results = _finish(request, evaluator, sites, trained)
        write_request(request.folder / RUN_RECORD, "run", request, model=model.name)
    return results


def _model_begun(request: Run) -> dict[str, Any] | None:
    """What the records in a run's folder say of the model; None if nothing was begun there."""
    if (request.folder / STORE / MANIFEST).is_file():
        return Manifest.load(request.folder / STORE).model
    folders = (folder for name in request.site for folder in request.folder.glob(name))
    trainings = map(recorded, folders)
    return next((found["rows"].get("model") for found in trainings if found is not None), None)


def _check(request: Run, model: LanguageModel) -> bool:
    """Refuse, before hours of harvesting, what cannot be trained, and a folder with trainings on
    other rows. Otherwise: whether something was begun there."""
    out, training, d_in = request.folder, request.training, model.d_model
    arms = request.grid.likely_arms(request.weigh, d_in)
    check_arms(arms, d_in, training)
    folders = {site: out / str(site) for site in request.sites}
    begun = [
        site
        for site, folder in folders.items()
        if training_in(folder).is_begun() or _choice_in(folder).is_begun()
    ]
    if not begun:
        parts = join().size if training.shard == "latents" else 1
        together = len(request.sites) if request.stream else 1
        check_room([d_in] * len(arms) * together, training, parts)
    store = Manifest.load(out / STORE) if (out / STORE / MANIFEST).is_file() else None
    if request.stream:
        check_out(out)
    elif begun and store and request.harvest.num_contexts > store.num_contexts:
        raise UsageError(
            f"{out} holds a training of {begun[0]} on "
            f"{store.num_contexts * store.context_size:,} tokens; choose another folder for more"
        )
    for site, folder in folders.items():
        found = recorded(folder)
        if found is not None and (found["rows"].get("kind") == "stream") != request.stream:
            made, change = ("store", "omit") if request.stream else ("stream", "add")
            raise UsageError(
                f"{out} holds a training of {site} on a {made}; {change} --stream to resume it, or "
                "choose another folder"
            )
    return bool(begun or store)


def _texts(request: Run, model: LanguageModel) -> tuple[list[Context], list[Context]]:
    """The held-out text, and other text on which α is chosen, if it is."""
    heldout = request.corpus.open("heldout")
    contexts = iter(Packer.for_model(model, request.harvest).contexts(heldout))
    own = take_contexts(contexts, request.evaluate.tokens)
    return own, take_contexts(contexts, TRIAL_TOKENS) if request.grid.is_automatic else []


def _rows(request: Run, model: LanguageModel) -> SiteRows:
    """Harvest, or prepare the stream."""
    text, corpus, out = request.corpus.open("train"), request.corpus.corpus, request.folder
    if request.streaming is None:
        tokens = f"{request.harvest.tokens:,} tokens"
        _write(f"[1/4] harvest: {tokens} of {corpus} through {model.name}")
        return harvest(model, text, request.sites, out / STORE, request.harvest)
    _write(f"[1/4] harvest: none: {corpus} goes through {model.name} while it is trained on")
    streams = ActivationStreams(model, text, request.sites, request.streaming, out)
    for site in request.sites:
        check_same_rows(out / str(site), streams.source(site).identity())
    return streams


class _Weighed(NamedTuple):
    """What was measured of a site, and the dictionaries that are to be trained there."""

    statistics: Statistics
    profile: dict[str, Any]
    weights: list[LossWeights]
    arms: list[ArmConfig]


def _weigh(
    request: Run, model: LanguageModel, rows: SiteRows, site: Site, trial: Sequence[Context]
) -> _Weighed:
    """Measure a site, choose its weights, and show its profile."""
    _write(f"[2/4] weigh: profile of {site}")
    grid, chosen = request.grid, None
    inputs = measure_inputs(grid.rules, rows, site, model=model)
    if trial:
        judge = FidelityEvaluator(model, trial, replace(request.evaluate, tokens=TRIAL_TOKENS))
        choice = _choose_alpha(request, inputs, rows.source(site), judge)
        chosen = choice["alpha"]
        found = ", ".join(f"{alpha}: {kl:.3f}" for alpha, kl in choice["kl"].items())
        said = "none is worth it" if chosen is None else f"chosen: {chosen:g}"
        _write(f"whitening, KL of short trainings by α ({found}); {said}")
    weights = grid.weights(inputs, request.weigh, chosen)
    facts = profile(inputs.statistics, weights)
    _write(profile_text(facts))
    return _Weighed(inputs.statistics, facts, weights, grid.arms(weights))


def _choice_in(folder: Path) -> Artifact:
    """The record of an exponent that trials chose for a site."""
    return Artifact(folder, "alpha.json", "choice of an exponent")


def _choose_alpha(
    request: Run, inputs: RuleInputs, source: ActivationSource, judge: FidelityEvaluator
) -> dict[str, Any]:
    """Train a plain TopK dictionary and a whitened one for each candidate on a part of the rows:
    ``{k, rows, kl, alpha}``, with the KL of each, and the exponent of the least; None if that is
    not ``LEAST_GAIN`` below the plain one. The choice is kept in the site's folder."""
    rule, processes, training, k = Rule.parse("whitening"), join(), request.training, _k(request)
    choices = _choice_in(request.folder / str(source.site))
    tokens = min(TRIAL_ROWS, training.tokens or TRIAL_ROWS, source.num_rows or TRIAL_ROWS)
    tokens = max(tokens, training.batch_size)  # a few rows may be read several times
    short = replace(training, tokens=tokens, tracker="none", finish=0.0)
    asked = {
        "source": source.identity(),
        "k": k,
        "candidates": CANDIDATES,
        "weights": rule.settings(request.weigh),
        "training": {n: v for n, v in vars(short).items() if n not in PROCEDURAL},
    }
    with processes.together():
        record = processes.lead(lambda: choices.begin(asked, choices.name))
    if not record.complete:
        arms = {"0": ArmConfig(weights_from_rule("uniform", 1.0, inputs), k)}
        for alpha in CANDIDATES:
            arms[f"{alpha:g}"] = ArmConfig(weights_from_rule(rule, alpha, inputs, request.weigh), k)
        trained = train(source, list(arms.values()), short, choices.folder / _TRIALS)

        def choose() -> Record:
            found = judge.evaluate(trained).dictionaries
            kl = {alpha: found[arm.name].kl for alpha, arm in arms.items()}
            best = min(kl, key=lambda alpha: kl[alpha])
            worth_it = best != "0" and kl[best] < (1 - LEAST_GAIN) * kl["0"]
            alpha = float(best) if worth_it else None
            record.facts |= {"k": k, "rows": tokens, "kl": kl, "alpha": alpha}
            choices.finish(record)
            return record

        with processes.together():
            record = processes.lead(choose)
    if processes.leads:  # also what a killed run left
        shutil.rmtree(choices.folder / _TRIALS, ignore_errors=True)
    return record.facts


def _k(request: Run) -> int:
    """Of the trials and of the raw dimensions."""
    return request.grid.k[0] if request.grid.k else _TRIAL_K


def _train(
    request: Run,
    model: LanguageModel,
    rows: SiteRows,
    arms: Mapping[Site, Sequence[ArmConfig]],
) -> dict[Site, dict[str, Dictionary]]:
    """All dictionaries of a site in one pass over its rows; of a stream, those of all sites."""
    trained: dict[Site, dict[str, Dictionary]] = {}
    for group in [arms] if rows.in_step else [{site: arms[site]} for site in arms]:
        number = sum(map(len, group.values()))
        where = f"{len(group)} sites" if len(group) > 1 else next(iter(group))
        _write(f"[3/4] train: {number} dictionaries of {where} in one pass")
        trained |= train_sites(rows, group, request.training, request.folder, model)
    return trained


def _finish(
    request: Run,
    evaluator: FidelityEvaluator,
    sites: Mapping[Site, _Weighed],
    trained: Mapping[Site, dict[str, Dictionary]],
) -> dict[Site, SiteResult]:
    """Evaluate, and write what is not a dictionary: only now, so a refused run changes nothing."""
    folders = {site: request.folder / str(site) for site in sites}
    for site, one in sites.items():
        write_json(folders[site] / "profile.json", one.profile)
        plot_profile(one.statistics, one.weights, str(site), folders[site] / "profile.png")
    places, tokens = ", ".join(map(str, sites)), f"{request.evaluate.tokens:,}"
    _write(f"[4/4] evaluate: {places} on {tokens} held-out tokens")
    results: dict[Site, SiteResult] = {}
    k = float(_k(request))
    measured = {
        site: own if site.is_mlp else with_raw_dimensions(own, sites[site].statistics, k)
        for site, own in trained.items()
    }
    for site, report in evaluator.evaluate_sites(measured):
        folder, dictionaries = folders[site], trained[site]
        _keep_metrics(folder, dictionaries, report)
        report.write(folder / "report.json")
        text = str(next(iter(dictionaries.values())).info.corpus.get("name", ""))
        latents = "../page.html" if not results else None  # as the command that is printed names it
        write_page(report, sites[site].arms, str(site), folder / PAGE, text, latents)
        results[site] = SiteResult(sites[site].profile, dictionaries, report, folder)
    every = [one for own in trained.values() for one in own.values()]
    if found := evaluator.together(every):
        write_json(request.folder / TOGETHER, plain(found))
        for name, together in found.items():
            _write(together.sentence(name))
    return results


def _keep_metrics(folder: Path, dictionaries: Mapping[str, Dictionary], report: Report) -> None:
    """Store each dictionary's measurements, and those of the baselines beside it, in its folder."""
    summaries = report.summaries()
    for name, dictionary in dictionaries.items():
        raw = {} if dictionary.site.is_mlp else {RAW: RAW}
        beside = raw | half_random_beside(dictionary, dictionaries)
        baselines = {label: {"fidelity": summaries[other]} for label, other in beside.items()}
        found = {"fidelity": summaries[name], "baselines": baselines}
        keep_measurements(folder / name, found)
        metrics = {**dictionary.info.metrics, **found}
        dictionary.info = replace(dictionary.info, metrics=metrics)


def _write(text: str) -> None:
    if leads():
        tqdm.write(text, file=sys.stderr)
