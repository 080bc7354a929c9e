"""What a study keeps of each dictionary: one JSON file, from which every report is made."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llm_wsae.artifact.files import read_own_json
from llm_wsae.artifact.provenance import plain, versions
from llm_wsae.dictionary.dictionary import DENSE_DENSITY
from llm_wsae.errors import LlmWsaeError, shown
from llm_wsae.evaluation.fidelity.report import Fidelity
from llm_wsae.evaluation.monosemanticity.report import DictionaryScores
from llm_wsae.evaluation.monosemanticity.token_concepts import LETTER
from llm_wsae.lab.planting.recovery import PlantRecovery
from llm_wsae.lab.studies.plan import BASELINES, PlannedArm
from llm_wsae.lab.studies.values import Value
from llm_wsae.machine.hardware import processor_name
from llm_wsae.outside import typed
from llm_wsae.statistics.documents import TextSize
from llm_wsae.training.config import Lengths


@dataclass(frozen=True)
class Measure:
    """One thing to compare."""

    title: str
    meaning: str
    source: Literal["fidelity", "latents", "concepts", "plants"]
    key: str
    lower_is_better: bool = False
    unscored: float | None = None
    """Value of a latent that fires too rarely to be scored; None excludes it from the mean."""
    family: str | None = None
    """Of concepts: the only family that counts, concept by concept. None: all families, each
    counted once, whatever its number of concepts."""


MEASURES = {
    "kl": Measure(
        "KL",
        "KL divergence of the predictions with the reconstruction from those without it; "
        "differences are shares of the plain dictionary's: lower is better",
        "fidelity",
        "kl",
        lower_is_better=True,
    ),
    "detection": Measure(
        "detection",
        "probability that a sampled context of a latent is more similar to its top contexts than "
        "one of the same genre in which it is silent, all from different documents",
        "latents",
        "detection",
    ),
    "spill": Measure(
        "spill",
        "drop in accuracy of the five other concepts' probes that are hit hardest, where removing "
        "latents has cost the concept's own probe 5 points: lower is better",
        "concepts",
        "spill",
        lower_is_better=True,
    ),
    "detection_all": Measure(
        "detection, all latents",
        "detection, counting dense latents and those that cannot be scored as chance (0.5): "
        "weights change which can be scored",
        "latents",
        "detection",
        unscored=0.5,
    ),
    "selectivity": Measure(
        "selectivity",
        "how much more the probe of a concept loses than those of the other concepts when its 5 "
        "best latents are removed; mean over families of concepts, of which first letters are one",
        "concepts",
        "selectivity",
    ),
    "absorbed": Measure(
        "absorbed",
        "share of words whose first letter the activations show, while its latents are silent and "
        "one other speaks for it; mean over letters: lower is better; not SAEBench's number",
        "concepts",
        "absorbed",
        lower_is_better=True,
        family=LETTER,
    ),
    "purity": Measure(
        "purity", "share of a latent's most frequent token in its top contexts", "latents", "purity"
    ),
    "probe_1": Measure(
        "1-latent probe",
        "area under the ROC curve of a concept's best latent",
        "concepts",
        "best_1",
    ),
}
PLANTED: dict[str, Measure] = {
    "planted_f1": Measure(
        "F1 of plants",
        "mean F1 of a planted feature's best latent, on rows that no dictionary was trained on",
        "plants",
        "f1",
    ),
    "planted_recovered": Measure(
        "recovered plants",
        "share of the planted features with a latent whose firing matches theirs (F1 of at least "
        "0.8)",
        "plants",
        "recovered",
    ),
}
"""Measures of a study with planted features, in addition."""
ALL_MEASURES = MEASURES | PLANTED
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
            "kl_per_document": [round(kl, 2) for kl in fidelity.kl_per_document],
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
        values=_values(record) | _of_plants(record.get("planted")),
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


def _values(record: Mapping[str, Any]) -> dict[str, Value]:
    latents, scores = record["latents"]["not_dense"], record["scores"]
    documents = tuple(record["kl_per_document"])
    found = {"kl": Value(record["fidelity"]["kl"], documents=documents)}
    for name, measure in MEASURES.items():
        if measure.source == "latents" and (one := latents[measure.key])["variance"] is not None:
            drawn = record["latents"]["resampled"]["not_dense"]
            drawn = drawn if measure.key == "detection" else None
            found[name] = _with_unscored(measure, one, scores["d_sae"], drawn)
        elif measure.source == "concepts":
            items = _items(measure, scores["concepts_not_dense"])
            if items:
                found[name] = Value(sum(items.values()) / len(items), items)
    return found


def _items(measure: Measure, summary: Mapping[str, Any]) -> dict[str, float]:
    """What a measure of concepts is the mean of: families, or the concepts of one of them."""
    parts = summary["families"]
    if measure.family is not None:
        named = f"{measure.family} "
        parts = {c: numbers for c, numbers in summary["concepts"].items() if c.startswith(named)}
    items = {part: numbers[measure.key] for part, numbers in parts.items()}
    return {part: value for part, value in items.items() if value is not None}


def _of_plants(planted: Mapping[str, Any] | None) -> dict[str, Value]:
    if planted is None:
        return {}
    found = {}
    for name, measure in PLANTED.items():
        column = planted["plants"][measure.key]
        items = {str(plant): value for plant, value in enumerate(column) if value is not None}
        if items:
            found[name] = Value(sum(items.values()) / len(items), items)
    return found


def _with_unscored(
    measure: Measure,
    scored: Mapping[str, float],
    d_sae: int,
    resampled: Sequence[float | None] | None,
) -> Value:
    """The mean over all latents, those without a score counted as ``measure.unscored``."""
    share, rest = 1.0, 0.0
    if measure.unscored is not None:
        share = scored["n"] / d_sae
        rest = (1 - share) * measure.unscored
    drawn = None
    if resampled is not None:
        drawn = tuple(None if value is None else rest + share * value for value in resampled)
    return Value(rest + share * scored["mean"], resampled=drawn)
