"""A study from start to end: plan → train → measure → report, in one folder (see ``folder``).

Stopped at any instant, the same command resumes it. A command with other rules, k or seeds adds to
the study. The report always covers everything that was tried in its folder, and so does the
correction for multiple tests.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from llm_wsae.artifact.files import folder_lock, remove_partials
from llm_wsae.artifact.provenance import plain
from llm_wsae.data.config import PackConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.data.store import open_stores
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.evaluation.heldout import Encoder
from llm_wsae.evaluation.monosemanticity.evaluator import MonosemanticityEvaluator
from llm_wsae.lab.planting.source import PlantedSource
from llm_wsae.lab.studies.config import Study
from llm_wsae.lab.studies.first import after_first, stand_ins
from llm_wsae.lab.studies.folder import (
    COMMAND,
    DICTIONARIES,
    FIRST,
    RESULTS,
    TRAINING,
    read_report,
    study_in,
)
from llm_wsae.lab.studies.jobs import StudyJobs
from llm_wsae.lab.studies.plan import PlannedArm, baselines, plan
from llm_wsae.lab.studies.report import REPORT_FILES, StudyReport
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.pipeline.request import train_beside, write_request
from llm_wsae.training.config import PROCEDURAL, TrainConfig
from llm_wsae.weights.rules import RuleInputs
from llm_wsae.weights.weighing import measure_inputs

_MEASURES = {"detection": 2}  # its definition; other numbers cannot stand beside it
_PROCEDURAL = {*PROCEDURAL, "shuffle_seed", "batch_tokens"}  # each arm has a seed of its own


def study(
    request: Study, model: LanguageModel | None = None, encoder: Encoder | None = None
) -> StudyReport:
    """Run, resume or extend a study of one site, and report on all of it.

    The dictionaries are trained on the stores and measured on the held-out part of the text.
    ``model`` is one that is loaded already, the one that made the stores; ``encoder`` a sentence
    encoder to use in place of ``request.score.encoder``. Without a first dictionary, the study
    trains one for each seed where a rule needs one, and both share the rows (``studies.first``).

    Raises UsageError for a request that cannot be right (a rule that does not exist, k above
    d_sae, …); LlmWsaeError if the folder holds another study, the text is too short, the model did
    not make the store, or a stage fails.
    """
    out, grid, site = request.out, request.compare, Site.parse(request.site)
    folder, written = study_in(out), (*REPORT_FILES, COMMAND, RESULTS, DICTIONARIES, TRAINING)
    folder.check_place(*written)
    store, training = open_stores(request.stores), train_beside(request.train, request.model)
    model = model or request.model.load(store.manifest.model)
    store.check_model(model.identity())
    heldout, packing = request.corpus.open("heldout"), PackConfig(**store.manifest.packing)
    contexts = Packer.for_model(model, packing).contexts(heldout)
    fidelity = FidelityEvaluator(model, contexts, request.evaluate)
    planted = PlantedSource(store, site, request.planted) if request.plant else None
    inputs = measure_inputs(
        grid.rules,
        store,
        site,
        model=model,
        dictionary=Dictionary.load(request.dictionary) if request.dictionary else None,
        planted=planted,  # weights are chosen for the rows that are trained on
    )
    needs_first = any(rule.need == "dictionary" for rule in grid.rules)
    trains_first = needs_first and request.dictionary is None
    arms = _planned(request, inputs, training, stand_ins(inputs, grid) if trains_first else None)
    basis = _basis(store.identity(site), heldout, request, training)
    with folder_lock(out, "study"):
        remove_partials(out, DICTIONARIES, RESULTS)
        if folder.is_begun():
            folder.begin(basis)  # or refuse
        source = store.source(site) if planted is None else planted
        # the frozen ones cannot have the free lengths that others are asked to have
        own = replace(training, lengths="auto") if training.lengths == "free" else training
        jobs = StudyJobs(source, out, grid, own, fidelity, model.device)
        judge = partial(MonosemanticityEvaluator, model, heldout, packing, request.score, encoder)
        monosemanticity = None
        if not folder.is_begun():
            monosemanticity = judge()  # the text may be too short: that is found before any work
            folder.begin(basis, *written)
        if trains_first:
            first = after_first(source, site, inputs, out / FIRST, grid, training)
            arms = _planned(request, inputs, training, first)
        missing = jobs.missing(arms + baselines(inputs, grid))
        if missing and monosemanticity is None:
            monosemanticity = judge()
        jobs.finish(missing, monosemanticity)
        report = read_report(out)
        report.write(out)
        write_request(out / COMMAND, "study", request)
    return report


def _basis(
    rows: dict[str, Any], heldout: Corpus, request: Study, training: TrainConfig
) -> dict[str, Any]:
    """What all results of a study have in common; ``rows`` identify those of the store."""
    # another processor rounds the same rows differently: still the same study
    rows = {name: value for name, value in rows.items() if name != "sha256"}
    planted = _settings(request.planted) if request.plant else {}
    basis: dict[str, Any] = plain(
        {
            "rows": rows,
            "text": heldout.identity(),
            "training": _settings(training) | {"architecture": request.compare.architecture},
            "fidelity": _settings(request.evaluate),
            "scoring": _settings(request.score),
            "planted": planted,
            "measures": _MEASURES,
        }
    )
    return basis


def _settings(config: Any) -> dict[str, Any]:
    """Those that change a result."""
    return {name: value for name, value in asdict(config).items() if name not in _PROCEDURAL}


def _planned(
    request: Study,
    inputs: RuleInputs,
    training: TrainConfig,
    first: Mapping[int, RuleInputs] | None,
) -> list[PlannedArm]:
    """As ``plan``. Raises UsageError for an arm that does not fit the dictionaries' width, or that
    cannot be trained with the lengths that are asked for."""
    arms = plan(inputs, request.compare, request.weigh, first)
    for planned in arms:
        planned.arm.check(training.expansion * inputs.statistics.d_in)
        planned.arm.lengths(training.lengths)
    return arms
