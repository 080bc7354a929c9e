"""A study from start to end: plan → train → measure → report, in one folder.

    study.json              what all its dictionaries share; a command with another is refused
    training/               dictionaries in the making, a group of one seed at a time
    dictionaries/<name>/    trained ones
    results/<name>.json     measured ones: what is there is never made again
    consistency.json        how alike the kept ones of different seeds are
    report.json, report.md, curve.png, differences.png

Stopped at any instant, the same command goes on. A command with other rules, k or seeds adds to the
study, and the report is always over everything that was tried in its folder: so is the correction
for having tried it.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llm_wsae.data.config import PackConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.fidelity.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.evaluation.monosemanticity.config import MonosemanticConfig
from llm_wsae.evaluation.monosemanticity.evaluator import MonosemanticityEvaluator
from llm_wsae.evaluation.monosemanticity.windows import Encoder
from llm_wsae.files import folder_lock, read_json, remove_partials, write_json
from llm_wsae.model.encoder_names import canonical_encoder
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.provenance import plain
from llm_wsae.studies import consistency
from llm_wsae.studies.config import StudyConfig
from llm_wsae.studies.plan import PlannedArm, plan
from llm_wsae.studies.report import StudyReport
from llm_wsae.studies.results import Result, read_basis, read_result, record_of
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.trainer import FINISHED, train
from llm_wsae.weighing import measure_inputs
from llm_wsae.weights.config import RuleInputConfig, WeightConfig

BASIS, TRAINING, DICTIONARIES, RESULTS, GROUP, CONSISTENCY = (
    "study.json",
    "training",
    "dictionaries",
    "results",
    "group.json",
    "consistency.json",
)
_PASS_BYTES = 1 << 30  # of parameters and optimiser state that are trained together
_MEASURED_TOGETHER = 8  # share the pass without dictionary; what a stop can cost, some minutes
_SAME_WEIGHTS = 1e-3  # relative: what rounding on another processor may change in γ
_BYTES_A_WEIGHT = 14  # float32, two moments of Adam, and a rounded copy
# Settings that change how a training proceeds, not what comes out; and the seed, an arm's own.
_HOW = ("device", "shard", "checkpoint_seconds", "log_every", "tracker", "shuffle_seed")


def study(
    model: LanguageModel,
    store: ActivationStore,
    site: Site,
    corpus: str,
    out: Path,
    config: StudyConfig = StudyConfig(),  # noqa: B008 - frozen
    *,
    text_column: str | None = None,
    weigh: WeightConfig = WeightConfig(),  # noqa: B008 - frozen
    training: TrainConfig = TrainConfig(),  # noqa: B008 - frozen
    fidelity: EvaluateConfig = EvaluateConfig(),  # noqa: B008 - frozen
    scoring: MonosemanticConfig = MonosemanticConfig(),  # noqa: B008 - frozen
    measure: RuleInputConfig = RuleInputConfig(),  # noqa: B008 - frozen
    dictionary: Dictionary | None = None,
    encoder: Encoder | None = None,
) -> StudyReport:
    """Run, finish or extend a study of one site, and report on all of it.

    ``model`` made the store; ``corpus`` is measured on its held-out part. ``dictionary`` is a first
    one, for rules that need it; ``encoder`` takes the place of ``scoring.encoder``. The seed of
    ``training`` is not used: every seed has its own.

    Raises UsageError for a request that cannot be right, LlmWsaeError for a folder that holds
    another study, text that is too short, or a store that the model did not make; what the stages
    raise.
    """
    store.check_model(model.identity())
    heldout = Corpus.open(corpus, "heldout", text_column=text_column)
    packing = PackConfig(**store.manifest.packing)
    faithful = FidelityEvaluator(
        model, Packer.for_model(model, packing).contexts(heldout), fidelity
    )
    known = measure_inputs(
        config.rules, store, site, model=model, dictionary=dictionary, config=measure
    )
    arms = plan(known, config, weigh)
    for planned in arms:
        planned.arm.check(training.expansion * store.d_in)
    rows = store.identity(site)
    del rows["sha256"]  # another processor rounds the same rows differently: still the same study
    basis = plain(
        {
            "rows": rows,
            "text": heldout.identity(),
            "training": {k: v for k, v in asdict(training).items() if k not in _HOW}
            | {"architecture": config.architecture},
            "fidelity": asdict(fidelity),
            "scoring": asdict(scoring) | {"encoder": canonical_encoder(scoring.encoder)},
        }
    )
    out = Path(out)
    with folder_lock(out, "study"):
        remove_partials(out, RESULTS)
        _check_basis(out, basis)
        study = _Study(store, site, out, config, training, faithful, model.device)
        missing = study.missing(arms)
        if missing:
            # Before any training: it may find the text too short, or a label unknown.
            study.bench = MonosemanticityEvaluator(model, heldout, packing, scoring, encoder)
            write_json(out / BASIS, basis)
        study.finish(missing)
        results = [read_result(path) for path in sorted((out / RESULTS).glob("*.json"))]
        agreements = consistency.measure(out / CONSISTENCY, _kept(out, results))
        report = StudyReport.of(str(site), basis, results, agreements)
        report.write(out)
    return report


class _Study:
    def __init__(
        self,
        store: ActivationStore,
        site: Site,
        out: Path,
        config: StudyConfig,
        training: TrainConfig,
        faithful: FidelityEvaluator,
        device: torch.device,
    ):
        self.store, self.site, self.out, self.device = store, site, out, device
        self.config, self.training, self.faithful = config, training, faithful
        self.bench: MonosemanticityEvaluator | None = None

    def missing(self, arms: Sequence[PlannedArm]) -> list[PlannedArm]:
        """Those that have no result yet. Raises LlmWsaeError for a result of other weights."""
        missing = []
        for planned in arms:
            path = self._result(planned)
            if not path.exists():
                missing.append(planned)
                continue
            found = read_json(path, "result of a study").get("identity")
            if not _same_arm(found, plain(planned.arm.identity())):
                raise LlmWsaeError(
                    f"{path} is of other weights under the same name (from another first "
                    "dictionary, or otherwise measured); choose another folder, or delete that file"
                )
        return missing

    def finish(self, missing: list[PlannedArm]) -> None:
        """Train and measure."""
        self._rescue()
        self._clear_away()
        bar = tqdm(
            total=2 * len(missing), desc="study", unit="step", smoothing=0, disable=not missing
        )
        with bar:
            there = {p.arm.name for p in missing if self._dictionary(p).exists()}
            bar.update(len(there))
            waiting = [p for p in missing if p.arm.name in there]  # trained, and not measured
            together = min(self._at_once(), _MEASURED_TOGETHER)
            for group in self._groups([p for p in missing if p.arm.name not in there]):
                while len(waiting) >= together:
                    self._measure(waiting[:together], bar)
                    del waiting[:together]
                self._train(group)
                bar.update(len(group))
                waiting += group
            for some in _chunks(waiting, together):
                self._measure(some, bar)

    def _train(self, group: Sequence[PlannedArm]) -> None:
        (seed,) = {planned.arm.init_seed for planned in group}
        names = [planned.arm.name for planned in group]
        folder = self._group_folder(names)
        write_json(folder / GROUP, names)
        config = replace(self.training, shuffle_seed=seed)
        train(self.store.source(self.site), [p.arm for p in group], config, folder)
        self._rescue()

    def _rescue(self) -> None:
        """Take finished dictionaries out of the groups that they were trained in."""
        for folder in self._group_folders():
            if not (folder / FINISHED).exists():
                continue
            for name in read_json(folder / GROUP, "list of a study's dictionaries"):
                target = self.out / DICTIONARIES / name
                target.parent.mkdir(exist_ok=True)
                if (folder / name).exists() and not target.exists():
                    (folder / name).rename(target)
            shutil.rmtree(folder)

    def _clear_away(self) -> None:
        """Begun trainings of dictionaries that were all measured since, by another command."""
        measured = {path.stem for path in (self.out / RESULTS).glob("*.json")}
        for folder in self._group_folders():
            if measured.issuperset(read_json(folder / GROUP, "list of a study's dictionaries")):
                shutil.rmtree(folder)

    def _groups(self, arms: list[PlannedArm]) -> Iterator[list[PlannedArm]]:
        """Arms to train in one pass: first groups that were begun, then the others by seed."""
        by_name = {planned.arm.name: planned for planned in arms}
        for folder in self._group_folders():
            names = read_json(folder / GROUP, "list of a study's dictionaries")
            if all(name in by_name for name in names):
                yield [by_name.pop(name) for name in names]
        for seed in dict.fromkeys(planned.arm.init_seed for planned in by_name.values()):
            own = [planned for planned in by_name.values() if planned.arm.init_seed == seed]
            yield from _chunks(own, self._at_once())

    def _at_once(self) -> int:
        """As many arms as fit into the memory of one pass."""
        weights = 2 * self.training.expansion * self.store.d_in**2
        return max(1, _PASS_BYTES // (_BYTES_A_WEIGHT * weights))

    def _measure(self, group: Sequence[PlannedArm], bar: tqdm) -> None:
        """Measure in one pass, and write a result for each."""
        loaded = {planned.arm.name: self._load(planned) for planned in group}
        found = self.faithful.evaluate(loaded).dictionaries
        for planned in group:
            name = planned.arm.name
            scores = self.bench.score({name: loaded[name]}).dictionaries[name]
            record = record_of(planned, found[name], scores, self.device)
            write_json(self._result(planned), record)
            if not self.config.keep_dictionaries:
                shutil.rmtree(self._dictionary(planned))
            bar.update()

    def _load(self, planned: PlannedArm) -> Dictionary:
        dictionary = Dictionary.load(self._dictionary(planned))
        gamma, own = dictionary.extras["gamma"], planned.arm.weights.gamma
        if gamma.shape != own.shape or (gamma - own).norm() > _SAME_WEIGHTS * own.norm():
            raise LlmWsaeError(
                f"{self._dictionary(planned)} was trained with other weights under the same name; "
                "choose another folder, or delete it"
            )
        return dictionary

    def _result(self, planned: PlannedArm) -> Path:
        return self.out / RESULTS / f"{planned.arm.name}.json"

    def _dictionary(self, planned: PlannedArm) -> Path:
        return self.out / DICTIONARIES / planned.arm.name

    def _group_folder(self, names: Sequence[str]) -> Path:
        digest = hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()
        return self.out / TRAINING / digest[:12]

    def _group_folders(self) -> list[Path]:
        return sorted(path.parent for path in (self.out / TRAINING).glob(f"*/{GROUP}"))


def _kept(out: Path, results: Sequence[Result]) -> dict[tuple[str, int], dict[int, Path]]:
    """Folders of measured dictionaries that are still there: label and k → seed → folder."""
    kept: dict[tuple[str, int], dict[int, Path]] = {}
    for result in results:
        folder = out / DICTIONARIES / result.name
        if folder.exists():
            kept.setdefault((result.label, result.point.k), {})[result.point.seed] = folder
    return kept


def _chunks(arms: Sequence[PlannedArm], size: int) -> Iterator[list[PlannedArm]]:
    """As few pieces as possible, as equal as possible."""
    pieces = -(-len(arms) // size)
    for number in range(pieces):
        first, last = (len(arms) * n // pieces for n in (number, number + 1))
        yield list(arms[first:last])


def _same_arm(found: Any, own: dict[str, Any]) -> bool:
    """Whether two identities are of one arm, but for the rounding of its weights."""
    if not isinstance(found, dict) or not isinstance(found.get("gamma_sum"), float):
        return False
    alike = math.isclose(found["gamma_sum"], own["gamma_sum"], rel_tol=_SAME_WEIGHTS)
    return alike and found | {"gamma_sum": 0.0} == own | {"gamma_sum": 0.0}


def _check_basis(out: Path, basis: Mapping[str, Any]) -> None:
    """Raise LlmWsaeError if the folder holds a study of something else."""
    path = out / BASIS
    if not path.exists():
        return
    found = read_basis(path)
    for part, settings in basis.items():
        own = found.get(part)
        if own == settings:
            continue
        names = [k for k in settings if not isinstance(own, dict) or own.get(k) != settings[k]]
        raise LlmWsaeError(
            f"the study in {out} has other settings of {part} ({', '.join(names) or 'more'}), so "
            "its dictionaries and these do not compare; choose another folder"
        )
