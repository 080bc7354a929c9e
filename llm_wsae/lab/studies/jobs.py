"""Trains and measures the dictionaries of a study that have no result yet.

A job is done when its result is a file, so a study that was stopped at any instant resumes.
"""

import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llm_wsae.artifact.files import read_own_json, remove_folder, write_json
from llm_wsae.artifact.provenance import plain
from llm_wsae.data.store import StoreSource
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.baselines import raw_dimensions
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.evaluation.monosemanticity.evaluator import MonosemanticityEvaluator
from llm_wsae.lab.planting.recovery import measure_recovery
from llm_wsae.lab.planting.source import PlantedSource
from llm_wsae.lab.studies.config import StudyGrid
from llm_wsae.lab.studies.first import on_share
from llm_wsae.lab.studies.folder import DICTIONARIES, RESULTS, TRAINING
from llm_wsae.lab.studies.plan import RAW, PlannedArm
from llm_wsae.lab.studies.results import record_of
from llm_wsae.training.checkpoint import is_finished, recorded
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.trainer import origin_of, train

PASS_BYTES = 1 << 30
"""Of parameters and optimiser state that are trained together."""
_MEASURED_TOGETHER = 8  # share the pass without a dictionary; a stop costs at most some minutes
_SAME_WEIGHTS = 1e-3  # relative: what rounding on another processor may change in γ
_BYTES_A_WEIGHT = 14  # float32, two moments of Adam, and a rounded copy


class StudyJobs:
    """The dictionaries of one study, in training and in measurement."""

    def __init__(
        self,
        source: StoreSource | PlantedSource,
        out: Path,
        grid: StudyGrid,
        training: TrainConfig,
        fidelity: FidelityEvaluator,
        device: torch.device,
    ):
        self.source, self.out, self.device = source, out, device
        self.grid, self.training, self.fidelity = grid, training, fidelity
        weights = 2 * training.expansion * source.d_in**2
        self.at_once = max(1, PASS_BYTES // (_BYTES_A_WEIGHT * weights))

    def missing(self, arms: Sequence[PlannedArm]) -> list[PlannedArm]:
        """Arms that have no result yet. Raises LlmWsaeError for a result of other weights."""
        missing = []
        for planned in arms:
            path = self._result(planned)
            if not path.exists():
                missing.append(planned)
                continue
            found = read_own_json(path, "result of a study")["identity"]
            if not _same_arm(found, plain(planned.identity(self.training.lengths))):
                raise LlmWsaeError(
                    f"{path} is the result of other weights with the same name (from another first "
                    "dictionary, or measured on other rows); choose another folder, or delete "
                    "that file"
                )
        return missing

    def finish(
        self, missing: Sequence[PlannedArm], monosemanticity: MonosemanticityEvaluator | None
    ) -> None:
        """Train and measure what is missing; the evaluator may be None if nothing is."""
        self._collect()
        for planned in missing:
            if planned.label == RAW and not self._dictionary(planned).exists():
                self._save_raw(planned)
        bar = tqdm(
            total=2 * len(missing), desc="study", unit="step", smoothing=0, disable=not missing
        )
        with bar:
            there = [planned for planned in missing if self._dictionary(planned).exists()]
            untrained = [planned for planned in missing if not self._dictionary(planned).exists()]
            bar.update(len(there))
            together = min(self.at_once, _MEASURED_TOGETHER)
            for group in self._groups(untrained):
                while len(there) >= together:
                    self._measure(there[:together], monosemanticity, bar)
                    del there[:together]
                self._train(group)
                bar.update(len(group))
                there += group
            for some in _chunks(there, together):
                self._measure(some, monosemanticity, bar)

    def _groups(self, arms: Sequence[PlannedArm]) -> Iterator[list[PlannedArm]]:
        """Arms to train in one pass: first the unfinished groups, then the others by seed and
        number of rows."""
        by_name = {planned.name: planned for planned in arms}
        for folder in self._training_folders():
            names = list((recorded(folder) or {"arms": ()})["arms"])
            if names and by_name.keys() >= set(names):
                yield [by_name.pop(name) for name in names]
            elif all((self.out / RESULTS / f"{name}.json").exists() for name in names):
                shutil.rmtree(folder)  # another command measured them, or nothing was begun
        for one in dict.fromkeys(map(_pass_of, by_name.values())):
            own = [planned for planned in by_name.values() if _pass_of(planned) == one]
            yield from _chunks(own, self.at_once)

    def _train(self, group: Sequence[PlannedArm]) -> None:
        seed, share = _pass_of(group[0])
        names = " ".join(sorted(planned.name for planned in group))
        folder = self.out / TRAINING / hashlib.sha256(names.encode()).hexdigest()[:12]
        config = replace(on_share(self.training, self.source, share), shuffle_seed=seed)
        train(self.source, [planned.arm for planned in group], config, folder)
        self._collect()

    def _collect(self) -> None:
        """Move finished dictionaries out of the groups in which they were trained."""
        (self.out / DICTIONARIES).mkdir(exist_ok=True)
        for folder in self._training_folders():
            if not is_finished(folder):
                continue
            for name in (recorded(folder) or {})["arms"]:
                target = self.out / DICTIONARIES / name
                if (folder / name).exists() and not target.exists():
                    (folder / name).rename(target)
            shutil.rmtree(folder)

    def _save_raw(self, planned: PlannedArm) -> None:
        """Save the raw dimensions, which are not trained, in the place of a trained dictionary."""
        statistics = self.source.statistics()
        origin = origin_of(self.source, statistics)
        info = DictionaryInfo(name=planned.name, rule="raw dimensions", **origin)
        raw_dimensions(info, statistics, float(planned.arm.level)).save(self._dictionary(planned))

    def _measure(
        self,
        group: Sequence[PlannedArm],
        monosemanticity: MonosemanticityEvaluator | None,
        bar: tqdm,
    ) -> None:
        """Measure in one pass, and write a result for each."""
        assert monosemanticity is not None
        loaded = {planned.name: self._load(planned) for planned in group}
        found = self.fidelity.evaluate(loaded).dictionaries
        for planned in group:
            name, own = planned.name, loaded[planned.name]
            scores = monosemanticity.score({name: own}).dictionaries[name]
            planted = None
            if isinstance(self.source, PlantedSource):
                planted = measure_recovery(own, self.source)
            identity = planned.identity(self.training.lengths)
            record = record_of(planned, identity, found[name], scores, planted, self.device)
            write_json(self._result(planned), record)
            if not self.grid.keep_dictionaries:
                remove_folder(self._dictionary(planned))
            bar.update()

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

    def _result(self, planned: PlannedArm) -> Path:
        return self.out / RESULTS / f"{planned.name}.json"

    def _dictionary(self, planned: PlannedArm) -> Path:
        return self.out / DICTIONARIES / planned.name

    def _training_folders(self) -> list[Path]:
        return sorted(path for path in (self.out / TRAINING).glob("*") if path.is_dir())


def _pass_of(planned: PlannedArm) -> tuple[int, float]:
    """What dictionaries that are trained together share: their seed, and the share of the rows."""
    return planned.arm.init_seed, planned.share


def _chunks(arms: Sequence[PlannedArm], size: int) -> Iterator[list[PlannedArm]]:
    """As few pieces as possible, of nearly equal length."""
    pieces = -(-len(arms) // size)
    for number in range(pieces):
        first, last = (len(arms) * n // pieces for n in (number, number + 1))
        yield list(arms[first:last])


def _same_arm(found: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether two identities are of one arm, up to the rounding of its weights."""
    alike = math.isclose(found["gamma_sum"], own["gamma_sum"], rel_tol=_SAME_WEIGHTS)
    return alike and found | {"gamma_sum": 0.0} == own | {"gamma_sum": 0.0}
