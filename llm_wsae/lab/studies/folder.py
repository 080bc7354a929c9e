"""The folder of a study: the names of its files, and the report that they give.

study.json              what all its dictionaries share; a command with other settings is refused
command.json            the last command
first/                  plain dictionaries of which some rules take their weights, one of each seed
training/               dictionaries in training, one group of one seed at a time
dictionaries/<name>/    trained dictionaries, and the raw dimensions
results/<name>.json     measured dictionaries; none is measured twice
report.json, report.md, report.html, differences.png
"""

from pathlib import Path
from typing import Any

from llm_wsae.artifact.artifact import Artifact
from llm_wsae.lab.studies.report import StudyReport
from llm_wsae.lab.studies.results import Result, read_result

BASIS, COMMAND, FIRST, TRAINING, DICTIONARIES, RESULTS = (
    "study.json",
    "command.json",
    "first",
    "training",
    "dictionaries",
    "results",
)


def study_in(folder: Path) -> Artifact:
    """The study in a folder."""
    return Artifact(folder, BASIS, "study")


def read_report(folder: Path) -> StudyReport:
    """The report on a study, from its files. Raises LlmWsaeError if one of them is damaged."""
    basis = read_basis(folder)
    return StudyReport.of(basis["rows"]["site"], basis, read_results(folder))


def read_results(folder: Path) -> list[Result]:
    """Every measured dictionary, by name. Raises LlmWsaeError if a file is damaged."""
    return [read_result(path) for path in sorted((folder / RESULTS).glob("*.json"))]


def read_basis(folder: Path) -> dict[str, Any]:
    """What all dictionaries of a study share. Raises LlmWsaeError if the file is damaged."""
    return study_in(folder).read().request
