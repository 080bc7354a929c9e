"""A study from start to end: plan → train → measure → report, in one folder (see ``folder``).

Stopped at any instant, the same command resumes it. A command with other rules, k or seeds adds to
the study. The report always covers everything that was tried in its folder, and so does the
correction for multiple tests.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from llm_wsae.artifact.files import folder_lock, remove_partials
from llm_wsae.artifact.provenance import plain
from llm_wsae.data.config import HELDOUT, PackConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.evaluation.config import EvaluateConfig, MonosemanticConfig
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.evaluation.monosemanticity.evaluator import MonosemanticityEvaluator
from llm_wsae.evaluation.monosemanticity.window_embeddings import Encoder
from llm_wsae.lab.planting.config import PlantConfig
from llm_wsae.lab.planting.source import PlantedSource
from llm_wsae.lab.studies.config import StudyConfig
from llm_wsae.lab.studies.first import after_first, needs_first, stand_ins
from llm_wsae.lab.studies.folder import (
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
from llm_wsae.training.config import PROCEDURAL, TrainConfig
from llm_wsae.weights.config import RuleInputConfig, WeightConfig
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.weighing import measure_inputs

_MEASURES = {"detection": 2}  # its definition; other numbers cannot stand beside it
_OF_TRAINING = (*PROCEDURAL, "shuffle_seed")  # each arm has a seed of its own


def study(
    model: LanguageModel,
    store: ActivationStore,
    site: Site,
    corpus: str,
    out: Path,
    config: StudyConfig = StudyConfig(),  # noqa: B008 - frozen
    *,
    text_column: str | None = None,
    heldout_fraction: float = HELDOUT,
    weigh: WeightConfig = WeightConfig(),  # noqa: B008 - frozen
    training: TrainConfig = TrainConfig(),  # noqa: B008 - frozen
    fidelity: EvaluateConfig = EvaluateConfig(),  # noqa: B008 - frozen
    scoring: MonosemanticConfig = MonosemanticConfig(),  # noqa: B008 - frozen
    measure: RuleInputConfig = RuleInputConfig(),  # noqa: B008 - frozen
    dictionary: Dictionary | None = None,
    encoder: Encoder | None = None,
) -> StudyReport:
    """Run, resume or extend a study of one site, and report on all of it.

    Args:
        model: The model that made the store.
        store: Activations to train on.
        site: One of the store's sites.
        corpus: Text whose held-out part the dictionaries are measured on.
        out: Folder of the study.
        config: Rules, exponents, k and seeds to compare.
        text_column: Column of the corpus that holds the text, where that is not clear.
        heldout_fraction: Share of the documents that was held out when the store was harvested.
        weigh: Where weights act, and how they change during training.
        training: Settings of every training; each seed of ``config`` replaces ``shuffle_seed``.
        fidelity: Settings of the fidelity measurement.
        scoring: Settings of the monosemanticity measurement.
        measure: Settings of the measurements that rules need.
        dictionary: A first dictionary of the site, for the rules that need one. Without it, the
            study trains one for each seed, and both share the rows (``studies.first``).
        encoder: Sentence encoder to use in place of ``scoring.encoder``.

    Raises:
        UsageError: The request cannot be right (a rule that does not exist, k above d_sae, …).
        LlmWsaeError: The folder holds another study, the text is too short, the model did not make
            the store, or a stage fails.
    """
    out = Path(out)
    folder, written = study_in(out), (*REPORT_FILES, RESULTS, DICTIONARIES, TRAINING)
    folder.check_place(*written)
    store.check_model(model.identity())
    heldout = Corpus.open(corpus, "heldout", heldout_fraction, text_column)
    packing = PackConfig(**store.manifest.packing)
    fidelity_evaluator = FidelityEvaluator(
        model, Packer.for_model(model, packing).contexts(heldout), fidelity
    )
    planted = None if config.plant is None else PlantedSource(store, site, config.plant)
    inputs = measure_inputs(
        config.rules,
        store,
        site,
        model=model,
        dictionary=dictionary,
        config=measure,
        planted=planted,  # weights are chosen for the rows that are trained on
    )
    trains_first = dictionary is None and needs_first(config.rules)
    first = stand_ins(inputs, config) if trains_first else None
    arms = _planned(inputs, config, weigh, training, first)
    basis = _basis(store.identity(site), heldout, config, training, fidelity, scoring)
    with folder_lock(out, "study"):
        remove_partials(out, DICTIONARIES, RESULTS)
        if folder.is_begun():
            folder.begin(basis)  # or refuse
        source = store.source(site) if planted is None else planted
        how = _for_frozen_too(training)
        jobs = StudyJobs(source, out, config, how, fidelity_evaluator, model.device)
        judge = partial(MonosemanticityEvaluator, model, heldout, packing, scoring, encoder)
        monosemanticity = None
        if not folder.is_begun():
            monosemanticity = judge()  # the text may be too short: that is found before any work
            folder.begin(basis, *written)
        if trains_first:
            first = after_first(source, site, inputs, out / FIRST, config, training)
            arms = _planned(inputs, config, weigh, training, first)
        missing = jobs.missing(arms + baselines(inputs, config))
        if missing and monosemanticity is None:
            monosemanticity = judge()
        jobs.finish(missing, monosemanticity)
        report = read_report(out)
        report.write(out)
    return report


def _basis(
    rows: dict[str, Any],
    heldout: Corpus,
    config: StudyConfig,
    training: TrainConfig,
    fidelity: EvaluateConfig,
    scoring: MonosemanticConfig,
) -> dict[str, Any]:
    """What all results of a study have in common; ``rows`` identify those of the store."""
    # another processor rounds the same rows differently: still the same study
    rows = {name: value for name, value in rows.items() if name != "sha256"}
    of_training = {k: v for k, v in asdict(training).items() if k not in _OF_TRAINING}
    basis: dict[str, Any] = plain(
        {
            "rows": rows,
            "text": heldout.identity(),
            "training": of_training | {"architecture": config.architecture},
            "fidelity": _settings(fidelity),
            "scoring": _settings(scoring),
            "planted": _plants(config.plant),
            "measures": _MEASURES,
        }
    )
    return basis


def _settings(config: EvaluateConfig | MonosemanticConfig) -> dict[str, Any]:
    """Without how many tokens go through the model at once, which changes no result."""
    return {name: value for name, value in asdict(config).items() if name != "batch_tokens"}


def _planned(
    inputs: RuleInputs,
    config: StudyConfig,
    weigh: WeightConfig,
    training: TrainConfig,
    first: Mapping[int, RuleInputs] | None = None,
) -> list[PlannedArm]:
    """As ``plan``. Raises UsageError for an arm that does not fit the dictionaries' width, or that
    cannot be trained with the lengths that are asked for."""
    arms = plan(inputs, config, weigh, first)
    for planned in arms:
        planned.arm.check(training.expansion * inputs.statistics.d_in)
        planned.arm.lengths(training.lengths)
    return arms


def _for_frozen_too(training: TrainConfig) -> TrainConfig:
    """The same for arms that can have the lengths that are asked for, and without a demand on the
    frozen ones beside them, which cannot have free ones."""
    return replace(training, lengths="auto") if training.lengths == "free" else training


def _plants(config: PlantConfig | None) -> dict[str, Any]:
    """What a study's description says of its plants; settings that are not made are not named."""
    settings = {} if config is None else asdict(config)
    return {name: value for name, value in settings.items() if value is not None}
