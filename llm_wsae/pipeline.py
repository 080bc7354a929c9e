"""The whole job in one call: harvest → weigh → train → evaluate → save, into one folder.

A store keeps the rows on the disk. A stream computes them while they are trained on, once for all
sites, and keeps none.

The same call after an interruption resumes it: finished stages are read back.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from llm_wsae.data.config import HarvestConfig, StreamConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.manifest import MANIFEST, Manifest
from llm_wsae.data.packing import Packer
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.folder import keep_measurements
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.evaluation.activations import take_contexts
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.evaluation.fidelity.report import Report
from llm_wsae.files import write_json
from llm_wsae.harvesting import harvest
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.planning.planning import LEAST_TOKENS, check_rows, plan
from llm_wsae.plots import plot_fidelity, plot_profile, write_page
from llm_wsae.processes import join, leads
from llm_wsae.streaming import ActivationStreams
from llm_wsae.training.arm import make_arms
from llm_wsae.training.checkpoint import CHECKPOINT, FINISHED, check_same_rows, recorded
from llm_wsae.training.config import ArchitectureName, TrainConfig
from llm_wsae.training.log import LOG
from llm_wsae.training.trainer import check_arms, check_out, train, train_sites
from llm_wsae.tuning import CHOICE, TRIAL_TOKENS, AlphaChoice, choose_alpha
from llm_wsae.weighing import measure_inputs, measure_stream_inputs
from llm_wsae.weights.choosing import choose_weights
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.profile import profile, profile_text
from llm_wsae.weights.rules import RULES, Rule

STORE, PAGE = "store", "report.html"
TRIAL_K = 32  # of the trials behind an automatic α, where no k is asked for
Alphas = Sequence[float | Literal["auto"]]


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
    architectures: Sequence[ArchitectureName] = ("topk",),
    init_seeds: Sequence[int] = (0,),
    text_column: str | None = None,
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
    Before the harvest, a few lines on stderr say what the run takes (``plan``).
    ``rules`` × ``alphas`` × (``ks`` × ``architectures`` and ``l1s``) × ``init_seeds`` are the arms.
    With ``"auto"`` among the alphas, whitening's is chosen by short trainings
    (``tuning.choose_alpha``), and the numbers are for the
    other rules.

    Under ``torchrun`` all processes make the same call. They harvest and train together, as
    ``harvest`` and ``train`` say; rank 0 alone says what the run takes, which is what it would take
    in one process, judges the trials of an exponent, evaluates and writes. The others wait for it
    and return ``{}``.

    Raises what its stages raise; a request that cannot be met is refused before the harvest.
    """
    sites = list(dict.fromkeys(sites))
    processes = join()
    with processes.together():  # no process looks at the folder when another has begun to write
        parsed = [Rule.parse(rule) for rule in rules]
        for rule in parsed:
            if rule.need == "dictionary":  # there is none yet
                raise rule.missing_input()
            rule.form(weight_config)
        _check_alphas(parsed, alphas)
        plain = LossWeights(torch.ones(model.d_model), RULES["uniform"])
        asked = make_arms([plain] if parsed else [], ks, l1s, init_seeds, architectures)
        check_arms(asked, model.d_model, train_config)
        check_rows(harvest_config, train_config)
        if stream_config is None:
            _check_not_trained_on_less(out, sites, harvest_config)
        else:
            check_out(out)
        _check_trained_alike(out, sites, stream_config is not None)
        if stream_config is not None and train_config.tokens is None:
            per_context = harvest_config.context_size - harvest_config.drop_positions
            train_config = replace(train_config, tokens=harvest_config.num_contexts * per_context)
        contexts = iter(
            Packer.for_model(model, harvest_config).contexts(
                Corpus.open(corpus, "heldout", text_column=text_column)
            )
        )
        # before hours of work are built on too little text
        heldout = take_contexts(contexts, evaluate_config.tokens)
        # α is chosen on other text than that by which it is judged here
        trial = take_contexts(contexts, TRIAL_TOKENS) if "auto" in alphas else []

        def announce() -> None:
            if _begun(out, sites) or (out / STORE / MANIFEST).is_file():
                return  # it was said when the run began
            takes = plan(
                model,
                sites,
                rules=rules,
                alphas=alphas,
                ks=ks,
                l1s=l1s,
                architectures=architectures,
                init_seeds=init_seeds,
                contexts=heldout,
                out=out,
                with_times=harvest_config.tokens >= LEAST_TOKENS,
                harvest_config=harvest_config,
                stream_config=stream_config,
                weight_config=weight_config,
                train_config=train_config,
                evaluate_config=evaluate_config,
            )
            tqdm.write(takes.text(), file=sys.stderr)

        processes.lead(announce)
    training_text = Corpus.open(corpus, "train", text_column=text_column)
    rows: ActivationStore | ActivationStreams
    if stream_config is None:
        _say(1, "harvest", f"{harvest_config.tokens:,} tokens of {corpus} through {model.name}")
        rows = harvest(model, training_text, sites, out / STORE, harvest_config)
    else:
        _say(1, "harvest", f"none: {corpus} goes through {model.name} while it is trained on")
        rows = ActivationStreams(model, training_text, sites, stream_config, out)
        for site in sites:
            check_same_rows(out / str(site), rows.identity(site))
    facts, arms = {}, {}
    for site in sites:
        _say(2, "weigh", f"profile of {site}")
        inputs = (
            measure_inputs(parsed, rows, site, model=model)
            if isinstance(rows, ActivationStore)
            else measure_stream_inputs(parsed, rows, site)
        )
        choice = None
        if trial:
            trials = replace(evaluate_config, tokens=TRIAL_TOKENS)
            choice = choose_alpha(
                inputs,
                rows.source(site),
                FidelityEvaluator(model, trial, trials),
                out / str(site),
                k=ks[0] if ks else TRIAL_K,
                training=train_config,
                config=weight_config,
            )
            if processes.leads:
                tqdm.write(choice.text(), file=sys.stderr)
        weights = _weights(inputs, parsed, alphas, choice, weight_config)
        shown = partial(_profile, inputs, site, out / str(site), weights)
        with processes.together():
            facts[site] = processes.lead(shown)
        arms[site] = make_arms(weights, ks, l1s, init_seeds, architectures)
    trained: dict[Site, dict[str, Dictionary]] = {}
    if isinstance(rows, ActivationStore):
        for site in sites:
            _say(3, "train", f"{len(arms[site])} dictionaries of {site} in one pass")
            trained[site] = train(rows.source(site), arms[site], train_config, out / str(site))
    else:
        number = sum(map(len, arms.values()))
        _say(3, "train", f"{number} dictionaries of {len(sites)} sites in one pass")
        trained = train_sites(rows, arms, train_config, out)
    places = ", ".join(map(str, sites))
    _say(4, "evaluate", f"{places} on {evaluate_config.tokens:,} held-out tokens")
    results: dict[Site, SiteResult] = {}
    with processes.together():
        if processes.leads:
            evaluator = FidelityEvaluator(model, heldout, evaluate_config)
            for site, report in _reports(evaluator, trained):
                folder, dictionaries = out / str(site), trained[site]
                _save_metrics(folder, dictionaries, report)
                report.write(folder / "report.json")
                plot_fidelity(report.summaries(), str(site), folder / "fidelity.png")
                write_page(report, arms[site], str(site), folder / PAGE)
                results[site] = SiteResult(facts[site], dictionaries, report, folder)
    return results


def _check_alphas(rules: Sequence[Rule], alphas: Alphas) -> None:
    numbers = [alpha for alpha in alphas if alpha != "auto"]
    if "auto" in alphas and not any(rule.has_automatic_alpha for rule in rules):
        raise UsageError(
            "an alpha of auto is chosen for whitening, which is not among the rules; add it, or "
            "give numbers"
        )
    others = [
        rule.name
        for rule in rules
        if not rule.is_plain and not ("auto" in alphas and rule.has_automatic_alpha)
    ]
    if others and not numbers:
        raise UsageError(
            f"the rule {others[0]!r} needs an alpha that is a number, next to auto for whitening: "
            "--alpha auto 0.5"
        )


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


def _begun(out: Path, sites: Sequence[Site]) -> list[Site]:
    """The sites of which something was trained, or the exponent was chosen."""
    left = (CHECKPOINT, FINISHED, CHOICE)
    return [site for site in sites if any((out / str(site) / name).exists() for name in left)]


def _check_not_trained_on_less(out: Path, sites: Sequence[Site], harvesting: HarvestConfig) -> None:
    """Refuse a longer harvest: what was trained belongs to the shorter one."""
    trained = _begun(out, sites)
    if trained and (out / STORE / MANIFEST).is_file():
        manifest = Manifest.load(out / STORE)
        if harvesting.num_contexts > manifest.num_contexts:
            raise UsageError(
                f"{out} holds a training of {trained[0]} on "
                f"{manifest.num_contexts * manifest.context_size:,} tokens; choose another folder "
                "for more"
            )


def _check_trained_alike(out: Path, sites: Sequence[Site], streamed: bool) -> None:
    """Refuse, before hours of harvesting, to go on from a store with what was streamed, and the
    other way round."""
    for site in sites:
        found = recorded(out / str(site))
        if found is not None and (found["rows"].get("kind") == "stream") != streamed:
            how = "a store; omit --stream" if streamed else "a stream; add --stream"
            raise UsageError(
                f"{out} holds a training of {site} on {how} to go on with it, or choose another "
                "folder"
            )


def _profile(
    inputs: RuleInputs, site: Site, folder: Path, weights: Sequence[LossWeights]
) -> dict[str, Any]:
    """The profile of a site, which is also written and printed."""
    facts = profile(inputs.statistics, weights)
    write_json(folder / "profile.json", facts)
    plot_profile(inputs.statistics, weights, str(site), folder / "profile.png")
    tqdm.write(profile_text(facts), file=sys.stderr)
    return facts


def _reports(
    evaluator: FidelityEvaluator, trained: Mapping[Site, Mapping[str, Dictionary]]
) -> Iterator[tuple[Site, Report]]:
    """The report of each site, from one pass for all. Where that fails, the sites are evaluated one
    by one, and what is raised in the end is the first error of these."""
    failure = None
    try:
        yield from evaluator.evaluate_sites(trained).items()
        return
    except LlmWsaeError as error:
        if len(trained) == 1:
            raise
        tqdm.write(f"{error}; the sites are evaluated one by one", file=sys.stderr)
    for site, dictionaries in trained.items():
        try:
            yield site, evaluator.evaluate(dictionaries)
        except LlmWsaeError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def _save_metrics(folder: Path, dictionaries: Mapping[str, Dictionary], report: Report) -> None:
    """Store each dictionary's measurements in its own folder, so that they travel with it."""
    summaries = report.summaries()
    for name, dictionary in dictionaries.items():
        found = {"fidelity": summaries[name]}
        keep_measurements(folder / name, found)
        metrics = {**dictionary.info.metrics, **found}
        dictionary.info = dataclasses.replace(dictionary.info, metrics=metrics)


def _say(number: int, stage: str, what: str) -> None:
    if leads():
        tqdm.write(f"[{number}/4] {stage}: {what}", file=sys.stderr)
