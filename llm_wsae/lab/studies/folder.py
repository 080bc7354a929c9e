"""The folder of a study: the names of its files, and the report that they give.

study.json              what all its dictionaries share; a command with other settings is refused
first/                  plain dictionaries of which some rules take their weights, one of each seed
training/               dictionaries in training, one group of one seed at a time
dictionaries/<name>/    trained dictionaries, and the raw dimensions
results/<name>.json     measured dictionaries; none is measured twice
report.json, report.md, report.html, differences.png
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_wsae.artifact.files import AGAIN, read_own_json
from llm_wsae.errors import LlmWsaeError
from llm_wsae.lab.studies.report import StudyReport
from llm_wsae.lab.studies.results import Result, read_result

BASIS, FIRST, TRAINING, DICTIONARIES, RESULTS = (
    "study.json",
    "first",
    "training",
    "dictionaries",
    "results",
)
_PARTS = {"rows", "text", "training", "fidelity", "scoring", "planted", "measures"}


def read_report(folder: Path) -> StudyReport:
    """The report on a study, from its files. Raises LlmWsaeError if one of them is damaged."""
    basis = read_basis(folder)
    return StudyReport.of(basis["rows"]["site"], basis, read_results(folder))


def read_results(folder: Path) -> list[Result]:
    """Every measured dictionary, by name. Raises LlmWsaeError if a file is damaged."""
    return [read_result(path) for path in sorted((folder / RESULTS).glob("*.json"))]


def read_basis(folder: Path) -> dict[str, Any]:
    """What all dictionaries of a study share. Raises LlmWsaeError if the file is damaged."""
    path = folder / BASIS
    basis = read_own_json(path, "description of a study")
    if not isinstance(basis, dict) or not all(isinstance(basis.get(p), dict) for p in _PARTS):
        raise LlmWsaeError(
            f"{path} is not the description of a study as this version writes it; {AGAIN}"
        )
    return basis


def check_basis(folder: Path, basis: Mapping[str, Any]) -> None:
    """Raise LlmWsaeError if the folder holds a study with other settings."""
    if not (folder / BASIS).exists():
        return
    found = read_basis(folder)
    for part, settings in basis.items():
        own = found[part]
        if _what_counts(own) == _what_counts(settings):
            continue
        names = [name for name in settings if own.get(name) != settings[name]]
        raise LlmWsaeError(
            f"the study in {folder} has other settings of {part} ({', '.join(names) or 'more'}), "
            "so its dictionaries cannot be compared with these; choose another folder"
        )


def _what_counts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without how many tokens go through the model at once, which changes no result."""
    return {name: value for name, value in settings.items() if name != "batch_tokens"}
