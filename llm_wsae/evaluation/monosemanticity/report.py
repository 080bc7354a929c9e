"""What was found about the monosemanticity of dictionaries: one JSON object, one table."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_wsae.evaluation.bootstrap import Bootstrap
from llm_wsae.evaluation.fidelity.report import Interval
from llm_wsae.evaluation.monosemanticity.concept_scores import LatentProbes, SiteProbes
from llm_wsae.evaluation.monosemanticity.latent_scores import SCORES
from llm_wsae.evaluation.monosemanticity.probing import PROBE_SIZES
from llm_wsae.files import write_json
from llm_wsae.provenance import plain
from llm_wsae.tables import aligned

COLUMNS = {
    "eligible %": "latents that fire in enough contexts to be scored: the next four are their "
    "means",
    "purity": SCORES["purity"],
    "coherence": SCORES["coherence"],
    "detection": SCORES["detection"] + ", with its 95 % interval over latents",
    "no token": SCORES["detection_without_tokens"] + " (of so many latents)",
    "probe 1": "area under the ROC curve of concepts, from the best latent (mean over concepts)",
    "probe 5": "the same from the best five latents",
    "selective": "how much more the accuracy of a concept's own dense probe falls than that of the "
    "others' when its best five latents are removed, with its 95 % interval over concepts",
    "dense %": "latents that fire on more than a tenth of the tokens",
}


@dataclass(frozen=True)
class Mean:
    """A mean over the latents, or concepts, that have the score."""

    mean: float
    interval: Interval
    """Its 95 % interval, by resampling them."""
    count: int
    share: float
    """``count`` as a share of all latents, or of all concepts."""


@dataclass(frozen=True)
class ConceptSummary:
    """Means over concepts, and what they are means of."""

    means: dict[str, Mean]
    """``best_1``, ``best_2``, ``best_5``: areas under the ROC curve of sparse probes;
    ``selectivity``, ``own_fall``, ``others_fall``: falls of dense probes' accuracy; ``density`` of
    the removed latents."""
    families: dict[str, dict[str, float]]
    """The same means within each family."""
    concepts: dict[str, dict[str, float]]
    """The same numbers for each concept."""


@dataclass(frozen=True)
class DictionaryScores:
    """One dictionary. ``not_dense``: without latents that fire on more than 10 % of the rows, in
    the means as well as in the choice of latents for concepts."""

    name: str
    site: str
    d_sae: int
    rows: int
    massive_rows: int
    """Rows left out as massive activations."""
    eligible_share: float
    dead_share: float
    dense_share: float
    l0: float
    latents: dict[str, Mean]
    """Means of the scores of ``latent_scores.SCORES`` over the eligible latents."""
    latents_not_dense: dict[str, Mean]
    concepts: ConceptSummary
    concepts_not_dense: ConceptSummary
    per_latent: dict[str, Tensor] = field(repr=False)
    """Every score, and ``density``, of every latent [d_sae]; NaN where it has none. Not in the
    JSON."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the numbers per latent."""
        return plain({k: v for k, v in vars(self).items() if k != "per_latent"})


@dataclass(frozen=True)
class MonosemanticReport:
    """Several dictionaries on the same text."""

    model: dict[str, Any]
    corpus: dict[str, Any]
    config: dict[str, Any]
    num_contexts: int
    num_rows: int
    num_documents: int
    chance: dict[str, float]
    """``purity`` and ``entropy`` of as many random contexts as a latent has top ones."""
    sites: dict[str, dict[str, Any]]
    """Per site what probes of the activations themselves reach: ``means``, ``families`` and
    ``concepts``, each with the area under the ROC curve of probes of all dimensions (``dense``) and
    of the best ones (``best_1``, ``best_2``, ``best_5``), and the ``accuracy`` of dense probes."""
    dictionaries: dict[str, DictionaryScores]
    consistency: dict[str, dict[str, Any]]
    """For dictionaries that differ in their seed only: ``dictionaries``, ``pw_mcc``, and
    ``pw_mcc_alive`` over the latents that fired."""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; a number that does not exist is null."""
        found = {name: scores.to_dict() for name, scores in self.dictionaries.items()}
        return plain(vars(self) | {"dictionaries": found})

    def write(self, path: Path) -> None:
        """Write the JSON report. Raises LlmWsaeError if that is impossible."""
        write_json(path, self.to_dict())

    def table(self) -> str:
        """A table for people, each column explained under it."""
        rows = [[name, *_cells(scores)] for name, scores in self.dictionaries.items()]
        width = max(map(len, COLUMNS))
        lines = [aligned([["dictionary", *COLUMNS], *rows], left=1), ""]
        lines += [f"{name.ljust(width)}  {meaning}" for name, meaning in COLUMNS.items()]
        lines += [
            "",
            f"{self.num_rows:,} tokens of held-out text in {self.num_contexts:,} contexts of "
            f"{self.num_documents:,} documents; random contexts have a purity of "
            f"{self.chance['purity']:.3f}.",
        ]
        for site, found in self.sites.items():
            means = found["means"]
            lines.append(
                f"{site}: probes of all dimensions reach {means['dense']:.3f} on "
                f"{len(found['concepts'])} concepts, of the best dimension "
                f"{means['best_1']:.3f}, of the best five {means['best_5']:.3f}."
            )
        for group, found in self.consistency.items():
            lines.append(
                f"{group}: {len(found['dictionaries'])} seeds agree to {found['pw_mcc']:.3f} "
                f"(PW-MCC; {found['pw_mcc_alive']:.3f} over the latents that fired)."
            )
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def mean_of(values: Float[Tensor, " items"], bootstrap: Bootstrap, total: int) -> Mean:
    """Mean and interval of the values that are not NaN, out of ``total`` latents or concepts.

    ``bootstrap`` resamples the items.
    """
    there = ~values.isnan()
    count = int(there.sum())
    if not count:
        return Mean(float("nan"), (float("nan"), float("nan")), 0, 0.0)
    sums = {
        "sum": values.where(there, 0.0).double().numpy(),
        "count": there.double().numpy(),
    }
    return Mean(
        float(values[there].double().mean()),
        bootstrap.interval(lambda total: total["sum"] / total["count"], sums),
        count,
        count / total,
    )


def latent_means(
    scores: dict[str, Float[Tensor, " d_sae"]],
    eligible: Bool[Tensor, " d_sae"],
    resamplings: int,
    seed: int,
) -> dict[str, Mean]:
    """Means of every score over the eligible latents."""
    number = int(eligible.sum())
    bootstrap = Bootstrap(max(number, 1), resamplings, seed)
    total = len(eligible)
    return {name: mean_of(values[eligible], bootstrap, total) for name, values in scores.items()}


def summarise_concepts(
    names: list[str], families: list[str], probes: LatentProbes, resamplings: int, seed: int
) -> ConceptSummary:
    """Means over all concepts and over each family."""
    columns = {f"best_{size}": probes.sparse[size] for size in PROBE_SIZES}
    columns |= {
        "selectivity": probes.selectivity,
        "own_fall": probes.own_fall,
        "others_fall": probes.others_fall,
        "density": probes.density,
    }
    bootstrap = Bootstrap(max(len(names), 1), resamplings, seed)
    return ConceptSummary(
        {name: mean_of(values, bootstrap, len(names)) for name, values in columns.items()},
        family_means(families, columns),
        by_concept(names, columns),
    )


def summarise_site(names: list[str], families: list[str], probes: SiteProbes) -> dict[str, Any]:
    """What ``MonosemanticReport.sites`` holds for a site."""
    columns = {"dense": probes.dense, "accuracy": probes.accuracy}
    columns |= {f"best_{k}": probes.raw[k] for k in PROBE_SIZES}
    means = {name: float(values.mean()) for name, values in columns.items()}
    return {
        "means": means,
        "families": family_means(families, columns),
        "concepts": by_concept(names, columns),
    }


def family_means(
    families: list[str], columns: dict[str, Float[Tensor, " concepts"]]
) -> dict[str, dict[str, float]]:
    """Means over the concepts of each family."""
    found = {}
    for family in dict.fromkeys(families):
        mine = torch.tensor([one == family for one in families])
        found[family] = {name: float(values[mine].mean()) for name, values in columns.items()}
    return found


def by_concept(
    names: list[str], columns: dict[str, Float[Tensor, " concepts"]]
) -> dict[str, dict[str, float]]:
    """The same numbers, concept by concept."""
    return {
        concept: {name: float(values[i]) for name, values in columns.items()}
        for i, concept in enumerate(names)
    }


def _cells(scores: DictionaryScores) -> list[str]:
    def shown(mean: Mean, interval: bool = False) -> str:
        low, high = mean.interval
        return f"{mean.mean:.3f}" + (f" [{low:.3f}, {high:.3f}]" if interval else "")

    latents, concepts = scores.latents, scores.concepts.means
    other = latents["detection_without_tokens"]
    return [
        f"{100 * scores.eligible_share:.1f}",
        shown(latents["purity"]),
        shown(latents["coherence"]),
        shown(latents["detection"], interval=True),
        f"{shown(other)} ({100 * other.share:.1f} %)",
        shown(concepts["best_1"]),
        shown(concepts["best_5"]),
        shown(concepts["selectivity"], interval=True),
        f"{100 * scores.dense_share:.1f}",
    ]
