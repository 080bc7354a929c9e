"""The folder of a study, and what it keeps of each dictionary: one JSON file, from which every
report is made.

study.json              what all its dictionaries share; a command with other settings is refused
command.json            the last command
training/               dictionaries in training, those of one seed at a time
dictionaries/<name>/    trained dictionaries, and the raw dimensions
results/<name>.json     measured dictionaries; none is measured twice
report.json, report.md, report.html
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
    text: TextSize | None = None
    """What fidelity was measured on."""

    @property
    def kl(self) -> float:
        """In nats."""
        return self.values["kl"].mean

    @property
    def is_baseline(self) -> bool:
        """Whether it is an untrained or half-trained baseline: shown, and compared with nothing."""
        return self.label in BASELINES


def study_in(folder: Path) -> Artifact:
    """The study in a folder."""
    return Artifact(folder, BASIS, "study")


def read_results(folder: Path) -> list[Result]:
    """Every measured dictionary, by name. Raises LlmWsaeError if a file is damaged."""
    return [read_result(path) for path in sorted((folder / RESULTS).glob("*.json"))]


def read_result(path: Path) -> Result:
    """Read a dictionary's file. Raises LlmWsaeError if it is damaged."""
    way_out = "delete it to measure that dictionary again"
    found = read_own_json(path, "result of a study", way_out)["result"]
    found.pop("share", None)  # of the rows, as earlier versions wrote it
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
    return plain(
        {
            "result": _result_of(planned, fidelity, scores, planted),
            "identity": identity,
            "measured_on": {"processor": processor_name(device), **versions()},
            "fidelity": fidelity.summary(),
            "scores": scores.to_dict(),
            "planted": None if planted is None else planted.to_dict(),
        }
    )


def _result_of(
    planned: PlannedArm,
    fidelity: Fidelity,
    scores: DictionaryScores,
    planted: PlantRecovery | None,
) -> Result:
    latents, found, summary = scores.per_latent, plain(scores.to_dict()), fidelity.summary()
    usual = latents["density"] <= DENSE_DENSITY
    density = latents["density"][usual].double()
    plants = None if planted is None else plain(planted.to_dict())["plants"]
    values: dict[str, Value | None] = {}
    for key, measure in STUDIED.items():
        name = measure.name
        if measure.source == "fidelity":
            sums = getattr(fidelity, f"{key}_per_document")
            documents = tuple(round(one, 2) for one in sums)
            values[key] = Value(summary[key], documents=documents)
        elif measure.source == "latents":
            resampled = scores.resampled[usual] if name == "detection" else None
            values[key] = over_latents(measure, latents[name][usual], found["d_sae"], resampled)
        elif measure.source == "concepts":
            values[key] = _mean_of(items_of(measure, found["concepts_not_dense"]))
        elif plants is not None:
            values[key] = _mean_of({str(n): one for n, one in enumerate(plants[name])})
    rows = summary["rows"] + summary["massive_rows"]
    return Result(
        name=planned.name,
        label=planned.label,
        control=planned.control,
        k=int(planned.arm.level),
        seed=planned.arm.init_seed,
        values={key: value for key, value in values.items() if value is not None},
        ce_recovered=summary["ce_recovered"],
        fvu=summary["fvu"],
        shares={key: found[key] for key in ("eligible_share", "dense_share", "dead_share", "l0")},
        density=float(density.mean()) * len(density) if len(density) else 0.0,
        text=TextSize(rows, summary["documents"], summary["effective_documents"]),
    )


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
