"""Trains and measures the dictionaries of a study that have no result yet.

A job is done when its result is a file, so a study that was stopped at any instant resumes.
"""

import hashlib
import json
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
from llm_wsae.lab.planting.recovery import PlantRecovery, measure_recovery
from llm_wsae.lab.planting.source import PlantedSource
from llm_wsae.lab.studies.config import StudyConfig
from llm_wsae.lab.studies.first import on_share
from llm_wsae.lab.studies.folder import DICTIONARIES, RESULTS, TRAINING
from llm_wsae.lab.studies.plan import RAW, PlannedArm
from llm_wsae.lab.studies.results import read_record, record_of
from llm_wsae.training.checkpoint import is_finished
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.export import origin_of
from llm_wsae.training.trainer import train

GROUP = "group.json"
_PASS_BYTES = 1 << 30  # of parameters and optimiser state that are trained together
_MEASURED_TOGETHER = 8  # share the pass without a dictionary; a stop costs at most some minutes
_SAME_WEIGHTS = 1e-3  # relative: what rounding on another processor may change in γ
_BYTES_A_WEIGHT = 14  # float32, two moments of Adam, and a rounded copy


class StudyJobs:
    """The dictionaries of one study, in training and in measurement."""

    def __init__(
        self,
        source: StoreSource | PlantedSource,
        out: Path,
        config: StudyConfig,
        training: TrainConfig,
        fidelity: FidelityEvaluator,
        device: torch.device,
    ):
        self.source, self.out, self.device = source, out, device
        self.config, self.training, self.fidelity = config, training, fidelity

    def missing(self, arms: Sequence[PlannedArm]) -> list[PlannedArm]:
        """Arms that have no result yet. Raises LlmWsaeError for a result of other weights."""
        missing = []
        for planned in arms:
            path = self._result(planned)
            if not path.exists():
                missing.append(planned)
                continue
            found = read_record(path).get("identity")
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
        self._discard_measured()
        for planned in missing:
            if planned.label == RAW and not self._dictionary(planned).exists():
                self._save_raw(planned)
        bar = tqdm(
            total=2 * len(missing), desc="study", unit="step", smoothing=0, disable=not missing
        )
        with bar:
            there = {p.name for p in missing if self._dictionary(p).exists()}
            bar.update(len(there))
            waiting = [p for p in missing if p.name in there]  # trained but not measured
            together = min(self._at_once(), _MEASURED_TOGETHER)
            for group in self._groups([p for p in missing if p.name not in there]):
                while len(waiting) >= together:
                    self._measure(waiting[:together], monosemanticity, bar)
                    del waiting[:together]
                self._train(group)
                bar.update(len(group))
                waiting += group
            for some in _chunks(waiting, together):
                self._measure(some, monosemanticity, bar)

    def _train(self, group: Sequence[PlannedArm]) -> None:
        ((seed, share),) = {_pass_of(planned) for planned in group}
        names = [planned.name for planned in group]
        folder = self._group_folder(names)
        write_json(folder / GROUP, {"dictionaries": names})
        config = replace(on_share(self.training, self.source, share), shuffle_seed=seed)
        train(self.source, [p.arm for p in group], config, folder)
        self._collect()

    def _save_raw(self, planned: PlannedArm) -> None:
        """Save the raw dimensions, which are not trained, in the place of a trained dictionary."""
        statistics = self.source.statistics()
        origin = origin_of(self.source, statistics)
        info = DictionaryInfo(name=planned.name, rule="raw dimensions", **origin)
        raw_dimensions(info, statistics, float(planned.arm.level)).save(self._dictionary(planned))

    def _collect(self) -> None:
        """Move finished dictionaries out of the groups in which they were trained."""
        for folder in self._group_folders():
            if not is_finished(folder):
                continue
            for name in _names_in(folder):
                target = self.out / DICTIONARIES / name
                target.parent.mkdir(exist_ok=True)
                if (folder / name).exists() and not target.exists():
                    (folder / name).rename(target)
            shutil.rmtree(folder)

    def _discard_measured(self) -> None:
        """Delete unfinished trainings whose dictionaries another command has measured since."""
        measured = {path.stem for path in (self.out / RESULTS).glob("*.json")}
        for folder in self._group_folders():
            if measured.issuperset(_names_in(folder)):
                shutil.rmtree(folder)

    def _groups(self, arms: list[PlannedArm]) -> Iterator[list[PlannedArm]]:
        """Arms to train in one pass: first the unfinished groups, then the others by seed and
        number of rows."""
        by_name = {planned.name: planned for planned in arms}
        for folder in self._group_folders():
            names = _names_in(folder)
            if all(name in by_name for name in names):
                yield [by_name.pop(name) for name in names]
        for one in dict.fromkeys(map(_pass_of, by_name.values())):
            own = [planned for planned in by_name.values() if _pass_of(planned) == one]
            yield from _chunks(own, self._at_once())

    def _at_once(self) -> int:
        """How many arms fit into the memory of one pass."""
        weights = 2 * self.training.expansion * self.source.d_in**2
        return max(1, _PASS_BYTES // (_BYTES_A_WEIGHT * weights))

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
            name = planned.name
            scores = monosemanticity.score({name: loaded[name]}).dictionaries[name]
            planted = self._recovery(loaded[name])
            record = record_of(
                planned, self.training.lengths, found[name], scores, planted, self.device
            )
            write_json(self._result(planned), record)
            if not self.config.keep_dictionaries:
                remove_folder(self._dictionary(planned))
            bar.update()

    def _recovery(self, dictionary: Dictionary) -> PlantRecovery | None:
        """How much of the planted features it recovers, if any were planted."""
        if not isinstance(self.source, PlantedSource):
            return None
        return measure_recovery(dictionary, self.source)

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

    def _group_folder(self, names: Sequence[str]) -> Path:
        digest = hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()
        return self.out / TRAINING / digest[:12]

    def _group_folders(self) -> list[Path]:
        return sorted(path.parent for path in (self.out / TRAINING).glob(f"*/{GROUP}"))


def _pass_of(planned: PlannedArm) -> tuple[int, float]:
    """What dictionaries that are trained together share: their seed, and the share of the rows."""
    return planned.arm.init_seed, planned.share


def _names_in(folder: Path) -> list[str]:
    """The dictionaries that are trained in a group's folder. Raises LlmWsaeError if its list is
    damaged."""
    way_out = f"delete {folder} to train its dictionaries again"
    found = read_own_json(folder / GROUP, "list of a study's dictionaries", way_out)
    names = found.get("dictionaries") if isinstance(found, dict) else None
    if not isinstance(names, list) or not all(map(_is_folder_name, names)):
        raise LlmWsaeError(f"{folder / GROUP} is not a list of dictionaries; {way_out}")
    return names


def _is_folder_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def _chunks(arms: Sequence[PlannedArm], size: int) -> Iterator[list[PlannedArm]]:
    """As few pieces as possible, of nearly equal length."""
    pieces = -(-len(arms) // size)
    for number in range(pieces):
        first, last = (len(arms) * n // pieces for n in (number, number + 1))
        yield list(arms[first:last])


def _same_arm(found: Any, own: dict[str, Any]) -> bool:
    """Whether two identities are of one arm, up to the rounding of its weights."""
    if not isinstance(found, dict) or not isinstance(found.get("gamma_sum"), float):
        return False
    alike = math.isclose(found["gamma_sum"], own["gamma_sum"], rel_tol=_SAME_WEIGHTS)
    return alike and found | {"gamma_sum": 0.0} == own | {"gamma_sum": 0.0}
