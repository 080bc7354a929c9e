"""A study from start to end: plan → train → measure → report, in one folder (see ``report``).

Its dictionaries are plain ones, the rules' and a control for each of those. Beside them stand
untrained and half-trained baselines, on which no verdict or correction depends. They may still look
interpretable (Korznikov et al. 2026, arXiv 2602.14111): where they come close to the others, a
measure says little of what was learnt.

A job is done when its result is a file, so the same command resumes what was stopped at any
instant. A command with other rules, k or seeds adds to the study. The report always covers
everything that was tried in its folder, and so does the correction for multiple tests.
"""

import hashlib
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llm_wsae.artifact.artifact import differences
from llm_wsae.artifact.files import (
    folder_lock,
    read_own_json,
    remove_folder,
    remove_partials,
    write_json,
)
from llm_wsae.artifact.provenance import plain, versions
from llm_wsae.data.config import HarvestConfig, PackConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.data.rows import SiteSource
from llm_wsae.data.store import ActivationStore, open_stores
from llm_wsae.dictionary.dictionary import DENSE_DENSITY, Dictionary
from llm_wsae.dictionary.finding import find_dictionary
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.baselines import raw_dimensions
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.evaluation.fidelity.report import Fidelity
from llm_wsae.evaluation.heldout import Encoder
from llm_wsae.evaluation.monosemanticity.evaluator import DictionaryScores, MonosemanticityEvaluator
from llm_wsae.lab.config import Study, StudyGrid
from llm_wsae.lab.planting import KnownSource, PlantedSource, measure_recovery
from llm_wsae.lab.studies.differences import Value
from llm_wsae.lab.studies.report import (
    COMMAND,
    DICTIONARIES,
    FROZEN,
    PAGE,
    PLAIN,
    RAW,
    REPORT,
    RESULTS,
    TRAINING,
    Result,
    StudyReport,
    read_results,
    study_in,
)
from llm_wsae.lab.upstream import UpstreamSource, plant_upstream
from llm_wsae.machine.hardware import processor_name
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.pipeline.request import train_beside, write_request
from llm_wsae.statistics.measures import STUDIED, Measure
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.checkpoint import is_finished, recorded
from llm_wsae.training.config import PROCEDURAL, TrainConfig
from llm_wsae.training.trainer import check_arms, origin_of, train
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import LossWeights, weights_from_rule
from llm_wsae.weights.rules import Rule
from llm_wsae.weights.scoring import RuleInputs
from llm_wsae.weights.weighing import measure_inputs

PASS_BYTES = 1 << 30
"""Of parameters and optimiser state that are trained together."""
UPSTREAM = "upstream"  # a study's folder of rows with features planted upstream
_MEASURED_TOGETHER = 8  # share the pass without a dictionary; a stop costs at most some minutes
_SAME_WEIGHTS = 1e-3  # relative: what rounding on another processor may change in γ
_BYTES_A_WEIGHT = 14  # float32, two moments of Adam, and a rounded copy
_MEASURES = {"detection": 2}  # its definition; other numbers cannot stand beside it
_PROCEDURAL = {*PROCEDURAL, "shuffle_seed", "batch_tokens"}  # each arm has a seed of its own


def study(
    request: Study, model: LanguageModel | None = None, encoder: Encoder | None = None
) -> StudyReport:
    """Run, resume or extend a study of one site, and report on all of it.

    The dictionaries are trained on the stores and measured on the held-out part of the text.
    ``model`` is one that is loaded already, the one that made the stores; ``encoder`` a sentence
    encoder to use in place of ``request.score.encoder``.

    Raises UsageError for a request that cannot be right (a rule that does not exist, k above
    d_sae, …); LlmWsaeError if the folder holds another study, the text is too short, the model did
    not make the store, or a stage fails.
    """
    out, grid, site = request.out, request.compare, Site.parse(request.site)
    first = request.dictionary
    folder, written = study_in(out), (REPORT, PAGE, COMMAND, RESULTS, DICTIONARIES, TRAINING)
    folder.check_place(*written)
    store, training = open_stores(request.stores), train_beside(request.train, request.model)
    model = model or request.model.load(store.manifest.model)
    store.check_model(model.identity())
    heldout, packing = request.corpus.open("heldout"), PackConfig(**store.manifest.packing)
    contexts = Packer.for_model(model, packing).contexts(heldout)
    fidelity = FidelityEvaluator(model, contexts, request.evaluate)
    basis = plain(_basis(store.identity(site), heldout, request, training))
    if folder.is_begun():  # another study is refused before anything is planted in its folder
        folder.check_request(folder.read().request, basis)
    source = _source(request, store, model, heldout)
    inputs = measure_inputs(  # of the rows that are trained on
        grid.rules,
        source,
        model=source.model if isinstance(source, UpstreamSource) else model,
        dictionary=None if first is None else Dictionary.load(find_dictionary(first)),
    )
    arms = plan(inputs, grid, request.weigh)
    check_arms([planned.arm for planned in arms], inputs.statistics.d_in, training)
    judge = partial(MonosemanticityEvaluator, model, heldout, packing, request.score, encoder)
    with folder_lock(out, "study"):
        remove_partials(out, DICTIONARIES, RESULTS)
        # the text may be too short, which is found before any work
        monosemanticity = None if folder.is_begun() else judge()
        folder.begin(basis, *written)
        jobs = _Jobs(request, source, training, fidelity, model.device)
        if missing := jobs.missing(arms + baselines(inputs, grid)):
            jobs.finish(missing, monosemanticity or judge())
        report = StudyReport.of(str(site), basis, read_results(out))
        report.write(out)
        write_request(out / COMMAND, "study", request)
    return report


def _source(
    request: Study, store: ActivationStore, model: LanguageModel, heldout: Corpus
) -> SiteSource:
    """What is trained on: rows of the store, with plants if they are asked for."""
    site = Site.parse(request.site)
    if request.plant:
        return PlantedSource(store, site, request.planted)
    if not request.plant_upstream:
        return store.source(site)
    made, text = store.manifest, request.corpus.open("train")
    if differing := differences(made.corpus, text.identity(), ("the store", "this command")):
        raise LlmWsaeError(
            f"features are planted into the text of the store, and this is another ({differing}); "
            "name that one, with the same --heldout-fraction"
        )
    size: dict[str, Any] = {"tokens": made.num_contexts * made.context_size, "dtype": made.dtype}
    rows, out = HarvestConfig(**made.packing, **size), request.out / UPSTREAM
    source = plant_upstream(model, text, heldout, site, out, request.upstream, rows)
    tqdm.write(source.words(), file=sys.stderr)
    return source


def _basis(
    rows: dict[str, Any], heldout: Corpus, request: Study, training: TrainConfig
) -> dict[str, Any]:
    """What all results of a study have in common; ``rows`` identify those of the store."""

    def settings(config: Any) -> dict[str, Any]:
        return {name: value for name, value in asdict(config).items() if name not in _PROCEDURAL}

    return {
        # another processor rounds the same rows differently: still the same study
        "rows": {name: value for name, value in rows.items() if name != "sha256"},
        "text": heldout.identity(),
        "training": settings(training) | {"architecture": request.compare.architecture},
        "fidelity": settings(request.evaluate),
        "scoring": settings(request.score),
        "planted": settings(request.planted) if request.plant else {},
        **({"upstream": settings(request.upstream)} if request.plant_upstream else {}),
        "measures": _MEASURES,
    }


@dataclass(frozen=True)
class PlannedArm:
    """One dictionary of a study."""

    arm: ArmConfig
    label: str  # name of its weights without the random draw, shared with other k and seeds
    control: str | None = None  # label of its control

    @property
    def name(self) -> str:
        """Of its folder and of its result."""
        return f"raw-dimensions-k{self.arm.k}" if self.label == RAW else self.arm.name


def plan(inputs: RuleInputs, grid: StudyGrid, weigh: WeightConfig) -> list[PlannedArm]:
    """All dictionaries but the baselines, seed by seed, the plain ones first. Controls are drawn
    again for every seed. Raises as ``weights_from_rule`` does."""
    arms: dict[str, PlannedArm] = {}
    for seed in dict.fromkeys(grid.seeds):
        for weights, control in _weights(inputs, grid, weigh, seed):
            for k in grid.k:
                arm = ArmConfig(weights, k, init_seed=seed, architecture=grid.architecture)
                arms.setdefault(arm.name, PlannedArm(arm, weights.label, control))
    return list(arms.values())


def _weights(
    inputs: RuleInputs, grid: StudyGrid, weigh: WeightConfig, seed: int
) -> Iterator[tuple[LossWeights, str | None]]:
    """The weights of a seed, each with the label of its control."""

    def drawn(rule: Rule, alpha: float) -> LossWeights:
        config = replace(weigh, draw=seed) if rule.is_drawn else weigh
        return weights_from_rule(rule, alpha, inputs, config)

    yield weights_from_rule(PLAIN, 1.0, inputs), None
    for rule, alpha in product(grid.rules, grid.alpha):
        weights, matched = drawn(rule, alpha), rule.matched_control(weigh)
        if weights.label == PLAIN:
            continue
        if matched is None:
            yield weights, None
        else:
            control = drawn(matched, alpha)
            yield weights, control.label
            yield control, None


def baselines(inputs: RuleInputs, grid: StudyGrid) -> list[PlannedArm]:
    """The raw dimensions, once, and for each seed a dictionary with a frozen decoder and one with a
    frozen encoder: all TopK, with the first k of the study. An architecture that all dictionaries
    of the study have is no baseline of it."""
    weights, k = weights_from_rule(PLAIN, 1.0, inputs), grid.k[0]
    found = [PlannedArm(ArmConfig(weights, k), RAW)]
    for seed, (name, label) in product(dict.fromkeys(grid.seeds), FROZEN.items()):
        if name != grid.architecture:
            arm = ArmConfig(weights, k, init_seed=seed, architecture=name)
            found.append(PlannedArm(arm, label))
    return found


class _Jobs:
    """The dictionaries of one study that have no result yet, in training and in measurement."""

    def __init__(
        self,
        request: Study,
        source: SiteSource,
        training: TrainConfig,
        fidelity: FidelityEvaluator,
        device: torch.device,
    ):
        self._out, self._keeps = request.out, request.compare.keep_dictionaries
        self._source, self._fidelity, self._device = source, fidelity, device
        # the frozen ones cannot have the free lengths that others are asked to have
        is_free = training.lengths == "free"
        self._training = replace(training, lengths="auto") if is_free else training
        weights = 2 * training.expansion * source.d_in**2
        self._at_once = max(1, PASS_BYTES // (_BYTES_A_WEIGHT * weights))
        self._collect()

    def missing(self, arms: Sequence[PlannedArm]) -> list[PlannedArm]:
        """Arms that have no result yet. Raises LlmWsaeError for a result of other weights."""
        missing = []
        for planned in arms:
            path = self._result(planned)
            if not path.exists():
                missing.append(planned)
                continue
            found = read_own_json(path, "result of a study")["identity"]
            own = plain(self._identity(planned))
            sums = found.pop("gamma_sum"), own.pop("gamma_sum")
            if found != own or not math.isclose(*sums, rel_tol=_SAME_WEIGHTS):
                raise LlmWsaeError(
                    f"{path} is the result of other weights with the same name (from another first "
                    "dictionary, or measured on other rows); choose another folder, or delete "
                    "that file"
                )
        return missing

    def finish(
        self, missing: Sequence[PlannedArm], monosemanticity: MonosemanticityEvaluator
    ) -> None:
        """Train and measure what is missing, group by group."""
        with tqdm(total=2 * len(missing), desc="study", unit="step", smoothing=0) as bar:
            for group in self._groups(missing):
                self._train([one for one in group if not self._dictionary(one).exists()])
                bar.update(len(group))
                for some in _chunks(group, min(self._at_once, _MEASURED_TOGETHER)):
                    self._measure(some, monosemanticity)
                    bar.update(len(some))

    def _groups(self, arms: Sequence[PlannedArm]) -> Iterator[list[PlannedArm]]:
        """First those that are trained, then the groups of which a training was stopped, then the
        others by seed."""
        left = {planned.name: planned for planned in arms}
        if trained := [one for one in arms if self._dictionary(one).exists() or one.label == RAW]:
            yield [left.pop(one.name) for one in trained]
        for folder in self._training_folders():
            names = list((recorded(folder) or {"arms": ()})["arms"])
            if names and left.keys() >= set(names):
                yield [left.pop(name) for name in names]
            elif all((self._out / RESULTS / f"{name}.json").exists() for name in names):
                shutil.rmtree(folder)  # another command measured them, or nothing was begun
        for seed in dict.fromkeys(planned.arm.init_seed for planned in left.values()):
            own = [planned for planned in left.values() if planned.arm.init_seed == seed]
            yield from _chunks(own, self._at_once)

    def _train(self, group: Sequence[PlannedArm]) -> None:
        if not group:
            return
        if group[0].label == RAW:  # which are not trained
            statistics = self._source.statistics()
            origin = origin_of(self._source, statistics)
            info = DictionaryInfo(name=group[0].name, rule="raw dimensions", **origin)
            made = raw_dimensions(info, statistics, float(group[0].arm.level))
            made.save(self._dictionary(group[0]))
            return
        names = " ".join(sorted(planned.name for planned in group))
        folder = self._out / TRAINING / hashlib.sha256(names.encode()).hexdigest()[:12]
        config = replace(self._training, shuffle_seed=group[0].arm.init_seed)
        train(self._source, [planned.arm for planned in group], config, folder)
        self._collect()

    def _collect(self) -> None:
        """Move finished dictionaries out of the groups in which they were trained."""
        (self._out / DICTIONARIES).mkdir(exist_ok=True)
        for folder in self._training_folders():
            if not is_finished(folder):
                continue
            for name in (recorded(folder) or {})["arms"]:
                target = self._out / DICTIONARIES / name
                if (folder / name).exists() and not target.exists():
                    (folder / name).rename(target)
            shutil.rmtree(folder)

    def _measure(
        self, group: Sequence[PlannedArm], monosemanticity: MonosemanticityEvaluator
    ) -> None:
        """Measure in one pass, and write a result for each."""
        loaded = {planned.name: self._load(planned) for planned in group}
        found = self._fidelity.evaluate(loaded).dictionaries
        for planned in group:
            name, own = planned.name, loaded[planned.name]
            scores = monosemanticity.score({name: own}).dictionaries[name]
            plants = None
            if isinstance(self._source, KnownSource):
                plants = plain(measure_recovery(own, self._source).to_dict())
            record = {
                "result": _result(planned, found[name], scores, plants),
                "identity": self._identity(planned),
                "measured_on": {"processor": processor_name(self._device), **versions()},
                "fidelity": found[name].summary(),
                "scores": scores.to_dict(),
                "planted": plants,
            }
            write_json(self._result(planned), plain(record))
            if not self._keeps:
                remove_folder(self._dictionary(planned))

    def _load(self, planned: PlannedArm) -> Dictionary:
        dictionary = Dictionary.load(self._dictionary(planned))
        if planned.label == RAW:
            return dictionary
        gamma, own = dictionary.extras["gamma"], planned.arm.weights.gamma
        if gamma.shape != own.shape or (gamma - own).norm() > _SAME_WEIGHTS * own.norm():
            raise LlmWsaeError(
                f"{self._dictionary(planned)} was trained with other weights of the same name; "
                "choose another folder, or delete it"
            )
        return dictionary

    def _identity(self, planned: PlannedArm) -> dict[str, Any]:
        """What a result must agree on."""
        arm, lengths = planned.arm, self._training.lengths
        return arm.identity(lengths) | {"rate": arm.rate(lengths)}

    def _result(self, planned: PlannedArm) -> Path:
        return self._out / RESULTS / f"{planned.name}.json"

    def _dictionary(self, planned: PlannedArm) -> Path:
        return self._out / DICTIONARIES / planned.name

    def _training_folders(self) -> list[Path]:
        return sorted(path for path in (self._out / TRAINING).glob("*") if path.is_dir())


def _chunks(arms: Sequence[PlannedArm], size: int) -> Iterator[list[PlannedArm]]:
    """As few pieces as possible, of nearly equal length."""
    pieces = -(-len(arms) // size)
    for number in range(pieces):
        first, last = (len(arms) * n // pieces for n in (number, number + 1))
        yield list(arms[first:last])


def _result(
    planned: PlannedArm,
    fidelity: Fidelity,
    scores: DictionaryScores,
    plants: Mapping[str, Any] | None,
) -> Result:
    """``plants`` is what was recovered of them, as JSON."""
    density = scores.per_latent["density"]
    density = density[density <= DENSE_DENSITY].double()
    values = {
        key: value
        for key, measure in STUDIED.items()
        if (value := _value(measure, fidelity, scores, plants)) is not None
    }
    shares = ("eligible_share", "dense_share", "dead_share", "l0")
    return Result(
        name=planned.name,
        label=planned.label,
        control=planned.control,
        k=int(planned.arm.level),
        seed=planned.arm.init_seed,
        values=values,
        ce_recovered=fidelity.ce_recovered,
        fvu=fidelity.fvu,
        shares={key: getattr(scores, key) for key in shares},
        density=float(density.mean()) * len(density) if len(density) else 0.0,
        text=fidelity.text,
    )


def _value(
    measure: Measure,
    fidelity: Fidelity,
    scores: DictionaryScores,
    plants: Mapping[str, Any] | None,
) -> Value | None:
    """A measure of one dictionary; None if it does not exist for it."""
    if measure.source == "fidelity":
        sums = getattr(fidelity, f"{measure.key}_per_document")
        documents = tuple(round(one, 2) for one in sums)
        return Value(getattr(fidelity, measure.key), documents=documents)
    if measure.source == "latents":
        usual = scores.per_latent["density"] <= DENSE_DENSITY
        resampled = scores.resampled[usual] if measure.name == "detection" else None
        column = scores.per_latent[measure.name][usual]
        return over_latents(measure, column, len(usual), resampled)
    if measure.source == "concepts":
        items = items_of(measure, plain(scores.concepts_not_dense))
    elif plants is not None:
        items = {str(n): one for n, one in enumerate(plants["plants"][measure.name])}
    else:
        return None
    known = {item: value for item, value in items.items() if value is not None}
    return Value(sum(known.values()) / len(known), known) if known else None


def over_latents(
    measure: Measure, column: Tensor, d_sae: int, resampled: Tensor | None
) -> Value | None:
    """The mean over the latents that have the score; those without one count as
    ``measure.unscored``. None if fewer than two have it."""
    known = column[~column.isnan()].double()
    if len(known) < 2:
        return None
    share, rest = 1.0, 0.0
    if measure.unscored is not None:
        share = len(known) / d_sae
        rest = (1 - share) * measure.unscored
    drawn = None
    if resampled is not None:  # NaN where it lacks the documents of every latent
        means = resampled.nanmean(0).tolist()
        drawn = tuple(None if mean != mean else rest + share * mean for mean in means)
    return Value(rest + share * float(known.mean()), resampled=drawn)


def items_of(measure: Measure, summary: Mapping[str, Any]) -> dict[str, float | None]:
    """What a measure of concepts is the mean of: families, or the concepts of one of them."""
    parts, prefix = summary["families"], ""
    if measure.family is not None:
        parts, prefix = summary["concepts"], f"{measure.family} "
    return {p: own[measure.name] for p, own in parts.items() if p.startswith(prefix)}
