"""What a study keeps of each dictionary: one JSON file, from which every report is made."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llm_wsae.dictionary.dictionary import DENSE_DENSITY
from llm_wsae.errors import LlmWsaeError, shown
from llm_wsae.evaluation.fidelity.report import Fidelity
from llm_wsae.evaluation.monosemanticity.report import DictionaryScores
from llm_wsae.evaluation.monosemanticity.token_concepts import LETTER
from llm_wsae.explaining.protocol import SCORES
from llm_wsae.files import read_own_json
from llm_wsae.hardware import processor_name
from llm_wsae.outside import typed
from llm_wsae.planting.recovery import PlantRecovery
from llm_wsae.provenance import plain, versions
from llm_wsae.statistics.documents import TextSize
from llm_wsae.studies.curve import Point, Value
from llm_wsae.studies.plan import BASELINES, PLAIN, PlannedArm
from llm_wsae.training.config import Lengths


@dataclass(frozen=True)
class Measure:
    """One thing to compare at equal cross-entropy."""

    title: str
    meaning: str
    source: Literal["latents", "concepts", "share", "plants", "explained"]
    key: str
    dense: bool = False
    """Whether latents that fire on more than 10 % of the tokens are included."""
    lower_is_better: bool = False
    unscored: float | None = None
    """Value of a latent that fires too rarely to be scored; None excludes it from the mean."""
    family: str | None = None
    """Of concepts: the only family that counts, concept by concept. None: all families, each
    counted once, whatever its number of concepts."""


MEASURES = {
    "detection": Measure(
        "detection",
        "probability that a sampled context of a latent is more similar to its top contexts than "
        "one of the same genre in which it is silent, all from different documents",
        "latents",
        "detection",
    ),
    "selectivity": Measure(
        "selectivity",
        "how much more the probe of a concept loses than those of the other concepts when its 5 "
        "best latents are removed; mean over families of concepts, of which first letters are one",
        "concepts",
        "selectivity",
    ),
    "selectivity_letters": Measure(
        "selectivity, letters",
        "selectivity of first letters of words alone, mean over letters",
        "concepts",
        "selectivity",
        family=LETTER,
    ),
    "spill": Measure(
        "spill",
        "drop in accuracy of the five other concepts' probes that are hit hardest, where removing "
        "latents has cost the concept's own probe 5 points: lower is better",
        "concepts",
        "spill",
        lower_is_better=True,
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
    "detection_all": Measure(
        "detection, all latents",
        "detection, counting dense latents and those that cannot be scored as chance (0.5): "
        "weights change which can be scored",
        "latents",
        "detection",
        unscored=0.5,
    ),
    "no_token": Measure(
        "detection, other tokens",
        "detection on contexts without the tokens of the top contexts",
        "latents",
        "detection_without_tokens",
    ),
    "purity": Measure(
        "purity", "share of a latent's most frequent token in its top contexts", "latents", "purity"
    ),
    "coherence": Measure(
        "coherence", "similarity of a latent's top contexts", "latents", "coherence"
    ),
    "probe_1": Measure(
        "1-latent probe",
        "area under the ROC curve of a concept's best latent",
        "concepts",
        "best_1",
    ),
    "probe_5": Measure(
        "5-latent probe", "the same of its 5 best latents together", "concepts", "best_5"
    ),
    "detection_dense": Measure(
        "detection, dense too", "detection with dense latents", "latents", "detection", dense=True
    ),
    "selectivity_dense": Measure(
        "selectivity, dense too",
        "selectivity with dense latents",
        "concepts",
        "selectivity",
        dense=True,
    ),
    "eligible": Measure(
        "scored", "share of latents that fire in enough contexts", "share", "eligible_share"
    ),
    "dense": Measure(
        "dense",
        "share of latents that fire on more than 10 % of the tokens",
        "share",
        "dense_share",
    ),
}
PLANTED: dict[str, Measure] = {
    "planted_recovered": Measure(
        "recovered",
        "share of the planted features with a latent whose firing matches theirs (F1 of at least "
        "0.8)",
        "plants",
        "recovered",
    ),
    "planted_f1": Measure("F1", "mean F1 of a planted feature's best latent", "plants", "f1"),
    "planted_cosine": Measure(
        "cosine",
        "mean cosine of a planted feature and the decoder row of its best latent",
        "plants",
        "cosine",
    ),
    "planted_slope": Measure(
        "slope",
        "answer of the best latent over the planted strength, where both fire; below 1 the feature "
        "is shrunk",
        "plants",
        "slope",
    ),
    "planted_vanished": Measure(
        "vanished",
        "share of a planted feature's firings on which its best latent is silent",
        "plants",
        "vanished",
        lower_is_better=True,
    ),
}
"""Measures of a study with planted features, in addition."""
EXPLAINED: dict[str, Measure] = {
    f"judged_{name}": Measure(f"{name} by a judge", meaning, "explained", name)
    for name, meaning in SCORES.items()
}
"""Measures of a study whose latents were explained by a language model, in addition."""
_WAY_OUT = "delete it to measure that dictionary again"
# In addition to the measures: means of a part.
FAMILY = "selectivity of "  # a family of concepts, without an interval
STRATUM = "planted F1 of "  # planted features along one kind of direction


@dataclass(frozen=True)
class Result:
    """One finished dictionary."""

    name: str
    label: str
    rule: str
    control: str | None
    point: Point
    ce_recovered: float
    fvu: float
    kl: float
    shares: dict[str, float]
    """``eligible_share``, ``dense_share``, ``dead_share`` and ``l0``."""
    density: float
    """Latents active per token, dense ones not counted."""
    processor: str
    """The processor it was measured on."""
    planted: dict[str, Any] | None = None
    """What it recovers of planted features (``PlantRecovery.to_dict``), if any were planted."""
    share: float = 1.0
    """Of the rows: less if a first dictionary was trained on the others."""
    kl_per_document: tuple[float, ...] = ()
    """Sums over the predictions of each document."""
    text: TextSize | None = None
    """What fidelity was measured on."""

    @property
    def is_claim(self) -> bool:
        """Whether its weights have a control: plain ones and random ones have none."""
        return self.control is not None

    @property
    def is_baseline(self) -> bool:
        """Whether it learnt nothing, or one half only: it is shown, and compared with nothing."""
        return self.label in BASELINES


def deciding(results: Iterable[Result]) -> tuple[str, str]:
    """The two measures that the verdict rests on: detection and spill; selectivity in place of
    spill, of results from before that was measured."""
    measured = any("spill" in r.point.values for r in results if r.label == PLAIN)
    return "detection", "spill" if measured else "selectivity"


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
                "all": {name: over_latents(v) for name, v in latents.items()},
                "not_dense": {name: over_latents(v[usual]) for name, v in latents.items()},
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
        rule=record["rule"],
        control=record["control"],
        point=Point(
            k=record["k"],
            seed=record["seed"],
            increase=fidelity["ce_spliced"] - fidelity["ce_clean"],
            values=_values(record["latents"], scores) | _of_plants(record.get("planted")),
        ),
        ce_recovered=fidelity["ce_recovered"],
        fvu=fidelity["fvu"],
        kl=fidelity["kl"],
        shares={key: scores[key] for key in ("eligible_share", "dense_share", "dead_share", "l0")},
        density=density["mean"] * density["n"] if density["n"] else 0.0,
        processor=record["measured_on"]["processor"],
        planted=record.get("planted"),
        share=record.get("identity", {}).get("share", 1.0),
        kl_per_document=tuple(record.get("kl_per_document", ())),  # of before: of one text
        text=TextSize(
            fidelity["rows"] + fidelity["massive_rows"],
            fidelity["documents"],
            fidelity["effective_documents"],
        )
        if "documents" in fidelity
        else None,
    )


def with_explained(
    results: Iterable[Result], explained: Mapping[str, Mapping[str, Any]]
) -> list[Result]:
    """The results with the scores of their latents' explanations, by name and score: ``mean`` and
    ``variance`` as ``over_latents`` gives them."""
    found = []
    for result in results:
        own = explained.get(result.name, {})
        values = {
            name: Value(own[measure.key]["mean"], own[measure.key]["variance"])
            for name, measure in EXPLAINED.items()
            if own.get(measure.key, {}).get("variance") is not None
        }
        point = replace(result.point, values={**result.point.values, **values})
        found.append(replace(result, point=point))
    return found


def over_latents(values: Tensor) -> dict[str, float]:
    """Mean over the latents that have the score, the variance of that mean, and their number."""
    there = values[~values.isnan()].double()
    count = len(there)
    variance = float(there.var()) / count if count > 1 else float("nan")
    return {"mean": float(there.mean() if count else torch.nan), "variance": variance, "n": count}


def _values(latents: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for name, measure in MEASURES.items():
        if measure.source == "share":
            found[name] = Value(scores[measure.key])
        elif measure.source == "latents":
            which = "all" if measure.dense else "not_dense"
            one = latents[which][measure.key]
            if one["variance"] is not None:
                resampled = latents.get("resampled", {}).get(which)  # missing in older results
                drawn = resampled if measure.key == "detection" else None
                found[name] = _with_unscored(measure, one, scores["d_sae"], drawn)
        else:
            items = _items(measure, scores["concepts" if measure.dense else "concepts_not_dense"])
            if items:
                found[name] = Value(sum(items.values()) / len(items), 0.0, items)
    for family, means in scores["concepts_not_dense"]["families"].items():
        if means["selectivity"] is not None:
            found[FAMILY + family] = Value(means["selectivity"])
    return found


def _items(measure: Measure, summary: Mapping[str, Any]) -> dict[str, float]:
    """What a measure of concepts is the mean of: families, or the concepts of one of them."""
    parts = summary["families"]
    if measure.family is not None:
        named = f"{measure.family} "
        parts = {c: numbers for c, numbers in summary["concepts"].items() if c.startswith(named)}
    items = {part: numbers.get(measure.key) for part, numbers in parts.items()}  # older: fewer
    return {part: value for part, value in items.items() if value is not None}


def _of_plants(planted: Mapping[str, Any] | None) -> dict[str, Value]:
    if planted is None:
        return {}
    plants = planted["plants"]
    columns = {name: plants[measure.key] for name, measure in PLANTED.items()}
    for stratum in dict.fromkeys(plants["stratum"]):
        pairs = zip(plants["f1"], plants["stratum"], strict=True)
        columns[STRATUM + stratum] = [f1 if own == stratum else None for f1, own in pairs]
    found = {}
    for name, column in columns.items():
        items = {str(plant): value for plant, value in enumerate(column) if value is not None}
        if items:
            found[name] = Value(sum(items.values()) / len(items), 0.0, items)
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
    return Value(rest + share * scored["mean"], share**2 * scored["variance"], resampled=drawn)
