"""What a study keeps of each dictionary: one JSON file, from which every report is made."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_wsae.artifact.files import read_own_json
from llm_wsae.artifact.provenance import plain, versions
from llm_wsae.dictionary.dictionary import DENSE_DENSITY
from llm_wsae.errors import LlmWsaeError, shown
from llm_wsae.evaluation.fidelity.report import Fidelity
from llm_wsae.evaluation.monosemanticity.report import DictionaryScores
from llm_wsae.lab.planting.recovery import PlantRecovery
from llm_wsae.lab.studies.plan import BASELINES, PlannedArm
from llm_wsae.lab.studies.values import Value
from llm_wsae.machine.hardware import processor_name
from llm_wsae.outside import typed
from llm_wsae.statistics.documents import TextSize
from llm_wsae.statistics.measures import STUDIED, Measure
from llm_wsae.training.config import Lengths

_WAY_OUT = "delete it to measure that dictionary again"


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
    share: float = 1.0
    """Of the rows: less if a first dictionary was trained on the others."""
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


def deciding(results: Iterable[Result]) -> tuple[str, ...]:
    """The measures that verdicts rest on: of a study with planted features their F1 as well."""
    planted = any("planted_f1" in result.values for result in results)
    return ("kl", "detection", "spill", *(("planted_f1",) if planted else ()))


def record_of(
    planned: PlannedArm,
    lengths: Lengths,
    fidelity: Fidelity,
    scores: DictionaryScores,
    planted: PlantRecovery | None,
    device: torch.device,
) -> dict[str, Any]:
    """Contents of a dictionary's result file, JSON-able. ``lengths`` were asked of the training;
    ``device`` is where it was measured."""
    arm, latents = planned.arm, scores.per_latent
    usual = latents["density"] <= DENSE_DENSITY
    return plain(
        {
            "name": planned.name,
            "label": planned.label,
            "control": planned.control,
            "rule": arm.weights.rule.name,
            "alpha": arm.weights.alpha,
            "k": arm.k,
            "seed": arm.init_seed,
            "identity": planned.identity(lengths),
            "measured_on": {"processor": processor_name(device), **versions()},
            "fidelity": fidelity.summary(),
            **_per_document(fidelity),
            "scores": scores.to_dict(),
            "latents": {
                "all": {name: _over_latents(v) for name, v in latents.items()},
                "not_dense": {name: _over_latents(v[usual]) for name, v in latents.items()},
                # of detection alone; the same resamplings of the documents for all dictionaries,
                # null where one lacks the documents of every latent
                "resampled": {
                    "all": scores.resampled.nanmean(0).tolist(),
                    "not_dense": scores.resampled[usual].nanmean(0).tolist(),
                },
            },
            **({} if planted is None else {"planted": planted.to_dict()}),
        }
    )


def read_result(path: Path) -> Result:
    """Read a dictionary's file. Raises LlmWsaeError if it is damaged."""
    record = read_record(path)
    try:
        result = typed(_result(record))
    except (KeyError, TypeError, AttributeError) as error:
        raise LlmWsaeError(
            f"{path} is not a result of a study as this version writes it ({error!r}); {_WAY_OUT}"
        ) from error
    if result.name != path.stem:
        raise LlmWsaeError(f"{path} holds the result of {shown(result.name)}; {_WAY_OUT}")
    return result


def read_record(path: Path) -> dict[str, Any]:
    """What ``record_of`` gave. Raises LlmWsaeError if the file is damaged."""
    record = read_own_json(path, "result of a study", _WAY_OUT)
    if not isinstance(record, dict):
        raise LlmWsaeError(f"{path} is not a result of a study; {_WAY_OUT}")
    return record


def _result(record: dict[str, Any]) -> Result:
    fidelity, scores = record["fidelity"], record["scores"]
    density = record["latents"]["not_dense"]["density"]
    return Result(
        name=record["name"],
        label=record["label"],
        control=record["control"],
        k=record["k"],
        seed=record["seed"],
        values=_values(record),
        ce_recovered=fidelity["ce_recovered"],
        fvu=fidelity["fvu"],
        shares={key: scores[key] for key in ("eligible_share", "dense_share", "dead_share", "l0")},
        density=density["mean"] * density["n"] if density["n"] else 0.0,
        share=record["identity"].get("share", 1.0),
        text=TextSize(
            fidelity["rows"] + fidelity["massive_rows"],
            fidelity["documents"],
            fidelity["effective_documents"],
        ),
    )


def _over_latents(values: Tensor) -> dict[str, float]:
    """Mean over the latents that have the score, the variance of that mean, and their number."""
    there = values[~values.isnan()].double()
    count = len(there)
    variance = float(there.var()) / count if count > 1 else float("nan")
    return {"mean": float(there.mean() if count else torch.nan), "variance": variance, "n": count}


def _per_document(fidelity: Fidelity) -> dict[str, list[float]]:
    """Sums over the predictions of each document, of the measures that have them."""
    keys = [f"{one.key}_per_document" for one in STUDIED.values() if one.per_document]
    return {key: [round(value, 2) for value in getattr(fidelity, key)] for key in keys}


def _values(record: Mapping[str, Any]) -> dict[str, Value]:
    """What the measures of a study found, as far as they are defined."""
    found: dict[str, Value | None] = {}
    for key, measure in STUDIED.items():
        if measure.source == "fidelity":
            documents = record[f"{key}_per_document"] if measure.per_document else None
            found[key] = Value(
                record["fidelity"][key], documents=None if documents is None else tuple(documents)
            )
        elif measure.source == "latents":
            found[key] = _of_latents(measure, record["latents"], record["scores"]["d_sae"])
        elif measure.source == "concepts":
            found[key] = _mean_of(_items(measure, record["scores"]["concepts_not_dense"]))
        elif (planted := record.get("planted")) is not None:
            found[key] = _mean_of(
                {str(n): one for n, one in enumerate(planted["plants"][measure.name])}
            )
    return {key: value for key, value in found.items() if value is not None}


def _items(measure: Measure, summary: Mapping[str, Any]) -> dict[str, float | None]:
    """What a measure of concepts is the mean of: families, or the concepts of one of them."""
    parts = summary["families"]
    if measure.family is not None:
        named = f"{measure.family} "
        parts = {c: numbers for c, numbers in summary["concepts"].items() if c.startswith(named)}
    return {part: numbers[measure.name] for part, numbers in parts.items()}


def _mean_of(items: Mapping[str, float | None]) -> Value | None:
    known = {item: value for item, value in items.items() if value is not None}
    return Value(sum(known.values()) / len(known), known) if known else None


def _of_latents(measure: Measure, latents: Mapping[str, Any], d_sae: int) -> Value | None:
    """The mean over all latents, those without a score counted as ``measure.unscored``."""
    scored = latents["not_dense"][measure.name]
    if scored["variance"] is None:
        return None
    share, rest = 1.0, 0.0
    if measure.unscored is not None:
        share = scored["n"] / d_sae
        rest = (1 - share) * measure.unscored
    drawn = None
    if measure.name == "detection":
        values = latents["resampled"]["not_dense"]
        drawn = tuple(None if value is None else rest + share * value for value in values)
    return Value(rest + share * scored["mean"], resampled=drawn)
