"""What is kept of each dictionary of a study: one JSON file, from which every report is made."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.fidelity.reconstruction import DENSE_DENSITY
from llm_wsae.evaluation.fidelity.report import Fidelity
from llm_wsae.evaluation.monosemanticity.report import DictionaryScores
from llm_wsae.files import read_json
from llm_wsae.hardware import processor_name
from llm_wsae.provenance import plain, versions
from llm_wsae.studies.curve import Point, Value
from llm_wsae.studies.plan import PlannedArm


@dataclass(frozen=True)
class Measure:
    """One thing to compare at equal cross-entropy."""

    title: str
    meaning: str
    source: Literal["latents", "concepts", "share"]
    key: str
    dense: bool = False
    """Whether latents that fire on more than 10 % of the tokens take part."""
    decides: bool = False
    """Whether the verdict hangs on it."""
    unscored: float | None = None
    """What a latent counts that fires too seldom to be scored; None: nothing, the mean is over the
    others."""


MEASURES = {
    "detection": Measure(
        "detection",
        "chance that a sampled context of a latent is nearer to its top ones than a silent context",
        "latents",
        "detection",
        decides=True,
    ),
    "selectivity": Measure(
        "selectivity",
        "how much more a concept's own probe suffers than the others' without its best 5 latents",
        "concepts",
        "selectivity",
        decides=True,
    ),
    "detection_all": Measure(
        "detection, all",
        "detection with those latents at chance that cannot be scored: weights change which can",
        "latents",
        "detection",
        unscored=0.5,
    ),
    "no_token": Measure(
        "no token", "detection without the top contexts' tokens", "latents",
        "detection_without_tokens",
    ),
    "purity": Measure("purity", "share of a latent's commonest token", "latents", "purity"),
    "coherence": Measure("coherence", "likeness of its top contexts", "latents", "coherence"),
    "probe_1": Measure("probe 1", "concepts told from their best latent", "concepts", "best_1"),
    "probe_5": Measure("probe 5", "from their best five", "concepts", "best_5"),
    "detection_dense": Measure(
        "detection+", "detection with the dense latents", "latents", "detection", dense=True
    ),
    "selectivity_dense": Measure(
        "selectivity+", "selectivity with them", "concepts", "selectivity", dense=True
    ),
    "eligible": Measure("eligible", "latents that can be scored", "share", "eligible_share"),
    "dense": Measure("dense", "latents that fire on more than 10 %", "share", "dense_share"),
}  # fmt: skip
DECIDING = tuple(name for name, measure in MEASURES.items() if measure.decides)
FAMILY = "selectivity of "  # beside the measures: the family's mean, no interval over concepts


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
    """Latents active on a token, without those that are dense."""
    processor: str
    """What it was measured on."""

    @property
    def is_claim(self) -> bool:
        """Whether its weights have a control: plain ones and random ones have none."""
        return self.control is not None


def record_of(
    planned: PlannedArm, fidelity: Fidelity, scores: DictionaryScores, device: torch.device
) -> dict[str, Any]:
    """What the file of a dictionary holds; JSON-able. ``device`` is what it was measured on."""
    arm, latents = planned.arm, scores.per_latent
    usual = latents["density"] <= DENSE_DENSITY
    return plain(
        {
            "name": arm.name,
            "label": planned.label,
            "control": planned.control,
            "rule": arm.weights.rule.name,
            "alpha": arm.weights.alpha,
            "k": arm.k,
            "seed": arm.init_seed,
            "identity": arm.identity(),
            "measured_on": {"processor": processor_name(device), **versions()},
            "fidelity": fidelity.summary(),
            "scores": scores.to_dict(),
            "latents": {
                "all": {name: _over_latents(v) for name, v in latents.items()},
                "not_dense": {name: _over_latents(v[usual]) for name, v in latents.items()},
            },
        }
    )


def read_result(path: Path) -> Result:
    """Read a dictionary's file. Raises LlmWsaeError if it is damaged."""
    try:
        return _result(read_json(path, "result of a study"))
    except (KeyError, TypeError, AttributeError) as error:
        raise LlmWsaeError(
            f"{path} is not the result of a study as this version writes it ({error!r}); delete it "
            "to have that dictionary measured again"
        ) from error


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
            values=_values(record["latents"], scores),
        ),
        ce_recovered=fidelity["ce_recovered"],
        fvu=fidelity["fvu"],
        kl=fidelity["kl"],
        shares={key: scores[key] for key in ("eligible_share", "dense_share", "dead_share", "l0")},
        density=density["mean"] * density["n"] if density["n"] else 0.0,
        processor=record["measured_on"]["processor"],
    )


def _over_latents(values: Tensor) -> dict[str, float]:
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
            one = latents["all" if measure.dense else "not_dense"][measure.key]
            if one["variance"] is not None:
                found[name] = _with_unscored(measure, one, scores["d_sae"])
        else:
            summary = scores["concepts" if measure.dense else "concepts_not_dense"]
            concepts = {c: n[measure.key] for c, n in summary["concepts"].items()}
            concepts = {c: value for c, value in concepts.items() if value is not None}
            if concepts:
                found[name] = Value(sum(concepts.values()) / len(concepts), 0.0, concepts)
    for family, means in scores["concepts_not_dense"]["families"].items():
        if means["selectivity"] is not None:
            found[FAMILY + family] = Value(means["selectivity"])
    return found


def _with_unscored(measure: Measure, scored: Mapping[str, float], d_sae: int) -> Value:
    """The mean of the scored latents, drawn towards what the others count."""
    if measure.unscored is None:
        return Value(scored["mean"], scored["variance"])
    share = scored["n"] / d_sae
    mean = measure.unscored + share * (scored["mean"] - measure.unscored)
    return Value(mean, share**2 * scored["variance"])
