"""The folder of a study, and what it keeps of each dictionary: one JSON file, from which every
report is made.

study.json              what all its dictionaries share; a command with other settings is refused
command.json            the last command
training/               dictionaries in training, those of one seed at a time
dictionaries/<name>/    trained dictionaries, and the raw dimensions
results/<name>.json     measured dictionaries; none is measured twice
report.json, report.html
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_wsae.artifact.artifact import Artifact
from llm_wsae.artifact.files import read_own_json
from llm_wsae.errors import LlmWsaeError, shown
from llm_wsae.lab.studies.differences import Value
from llm_wsae.statistics.uncertainty import TextSize
from llm_wsae.training.config import ArchitectureName

BASIS, COMMAND = "study.json", "command.json"
TRAINING, DICTIONARIES, RESULTS = "training", "dictionaries", "results"
PLAIN = "uniform"
RAW = "topk baseline: raw dimensions"
FROZEN: dict[ArchitectureName, str] = {
    "frozen-decoder": "topk baseline: frozen decoder",
    "frozen-encoder": "topk baseline: frozen encoder",
}
"""Labels of the half-trained baselines, by their architecture."""
BASELINES = (RAW, *FROZEN.values())


@dataclass(frozen=True)
class Result:
    """One finished dictionary."""

    name: str
    label: str
    control: str | None
    k: int
    seed: int
    values: Mapping[str, Value]
    """By measure; a measure that does not exist for the dictionary is omitted."""
    ce_recovered: float
    fvu: float
    shares: dict[str, float]  # ``eligible_share``, ``dense_share``, ``dead_share`` and ``l0``
    density: float  # latents active per token, dense ones not counted
    text: TextSize  # what fidelity was measured on

    @property
    def is_baseline(self) -> bool:
        """Whether it is an untrained or half-trained baseline: shown, and compared with nothing."""
        return self.label in BASELINES


def study_in(folder: Path) -> Artifact:
    """The study in a folder."""
    return Artifact(folder, BASIS, "study")


def read_results(folder: Path) -> list[Result]:
    """Every measured dictionary, by name. Raises LlmWsaeError if a file is damaged or another's."""
    return [_read(path) for path in sorted((folder / RESULTS).glob("*.json"))]


def _read(path: Path) -> Result:
    way_out = "delete it to measure that dictionary again"
    found = read_own_json(path, "result of a study", way_out)["result"]
    if found["name"] != path.stem:
        raise LlmWsaeError(f"{path} holds the result of {shown(found['name'])}; {way_out}")
    values = {name: Value(**value) for name, value in found["values"].items()}
    return Result(**{**found, "values": values, "text": TextSize(**found["text"])})


def deciding(results: Iterable[Result]) -> tuple[str, ...]:
    """The measures that verdicts rest on: of a study with planted features their F1 as well."""
    planted = any("planted_f1" in result.values for result in results)
    return ("kl", "detection", "spill", *(("planted_f1",) if planted else ()))
