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
from typing import Any

import torch
from torch import Tensor

from llm_wsae.artifact.artifact import Artifact
from llm_wsae.artifact.files import read_own_json
from llm_wsae.artifact.provenance import plain, versions
from llm_wsae.dictionary.dictionary import DENSE_DENSITY
from llm_wsae.evaluation.fidelity.report import Fidelity
from llm_wsae.evaluation.monosemanticity.report import DictionaryScores
from llm_wsae.lab.recovery import PlantRecovery
from llm_wsae.lab.studies.arms import BASELINES, PlannedArm
from llm_wsae.lab.studies.differences import Value
from llm_wsae.machine.hardware import processor_name
from llm_wsae.statistics.documents import TextSize
from llm_wsae.statistics.measures import STUDIED, Measure

BASIS, COMMAND = "study.json", "command.json"
TRAINING, DICTIONARIES, RESULTS = "training", "dictionaries", "results"


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
    shares: dict[str, float]
    """``eligible_share``, ``dense_share``, ``dead_share`` and ``l0``."""
    density: float
    """Latents active per token, dense ones not counted."""
    text: TextSize
    """What fidelity was measured on."""

    @property
    def is_baseline(self) -> bool:
        """Whether it is an untrained or half-trained baseline: shown, and compared with nothing."""
        return self.label in BASELINES


def study_in(folder: Path) -> Artifact:
    """The study in a folder."""
    return Artifact(folder, BASIS, "study")


def read_results(folder: Path) -> list[Result]:
    """Every measured dictionary, by name. Raises LlmWsaeError if a file is damaged."""
    return [_read(path) for path in sorted((folder / RESULTS).glob("*.json"))]


def _read(path: Path) -> Result:
    way_out = "delete it to measure that dictionary again"
    found = read_own_json(path, "result of a study", way_out)["result"]
    values = {name: Value(**value) for name, value in found["values"].items()}
    return Result(**{**found, "values": values, "text": TextSize(**found["text"])})


def deciding(results: Iterable[Result]) -> tuple[str, ...]:
    """The measures that verdicts rest on: of a study with planted features their F1 as well."""
    planted = any("planted_f1" in result.values for result in results)
    return ("kl", "detection", "spill", *(("planted_f1",) if planted else ()))


def record_of(
    planned: PlannedArm,
    identity: dict[str, Any],
    fidelity: Fidelity,
    scores: DictionaryScores,
    planted: PlantRecovery | None,
    device: torch.device,
) -> dict[str, Any]:
    """Contents of a dictionary's result file, JSON-able. ``identity`` is the arm's; ``device`` is
    where it was measured."""
    summary, found = fidelity.summary(), plain(scores.to_dict())
    plants = None if planted is None else plain(planted.to_dict())
    usual = scores.per_latent["density"] <= DENSE_DENSITY
    density = scores.per_latent["density"][usual].double()
    values = {
        key: value
        for key, measure in STUDIED.items()
        if (value := _value(measure, fidelity, scores, found, plants)) is not None
    }
    result = Result(
        name=planned.name,
        label=planned.label,
        control=planned.control,
        k=int(planned.arm.level),
        seed=planned.arm.init_seed,
        values=values,
        ce_recovered=summary["ce_recovered"],
        fvu=summary["fvu"],
        shares={key: found[key] for key in ("eligible_share", "dense_share", "dead_share", "l0")},
        density=float(density.mean()) * len(density) if len(density) else 0.0,
        text=TextSize(
            summary["rows"] + summary["massive_rows"],
            summary["documents"],
            summary["effective_documents"],
        ),
    )
    return plain(
        {
            "result": result,
            "identity": identity,
            "measured_on": {"processor": processor_name(device), **versions()},
            "fidelity": summary,
            "scores": found,
            "planted": plants,
        }
    )


def _value(
    measure: Measure,
    fidelity: Fidelity,
    scores: DictionaryScores,
    found: Mapping[str, Any],
    planted: Mapping[str, Any] | None,
) -> Value | None:
    """A measure of one dictionary; None if it does not exist for it. ``found`` and ``planted`` are
    scores and recovery as JSON."""
    if measure.source == "fidelity":
        sums = getattr(fidelity, f"{measure.key}_per_document")
        documents = tuple(round(one, 2) for one in sums)
        return Value(fidelity.summary()[measure.key], documents=documents)
    if measure.source == "latents":
        usual = scores.per_latent["density"] <= DENSE_DENSITY
        resampled = scores.resampled[usual] if measure.name == "detection" else None
        column = scores.per_latent[measure.name][usual]
        return over_latents(measure, column, len(usual), resampled)
    if measure.source == "concepts":
        return _mean_of(items_of(measure, found["concepts_not_dense"]))
    if planted is None:
        return None
    return _mean_of({str(n): one for n, one in enumerate(planted["plants"][measure.name])})


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
    parts = summary["families"]
    if measure.family is not None:
        named = f"{measure.family} "
        parts = {c: numbers for c, numbers in summary["concepts"].items() if c.startswith(named)}
    return {part: numbers[measure.name] for part, numbers in parts.items()}


def _mean_of(items: Mapping[str, float | None]) -> Value | None:
    known = {item: value for item, value in items.items() if value is not None}
    return Value(sum(known.values()) / len(known), known) if known else None
