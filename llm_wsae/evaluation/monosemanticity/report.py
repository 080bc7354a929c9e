"""What was found about the monosemanticity of dictionaries: one JSON object, one table."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llm_wsae.artifact.provenance import plain
from llm_wsae.evaluation.monosemanticity.averages import ConceptSummary, Mean
from llm_wsae.statistics.documents import TextSize
from llm_wsae.statistics.measures import LETTER, MONOSEMANTICITY
from llm_wsae.terminal import Table, printable


@dataclass(frozen=True)
class DictionaryScores:
    """Scores of one dictionary. ``not_dense``: without latents that fire on more than 10 % of the
    rows, neither in the means nor in the choice of latents for concepts."""

    name: str
    site: str
    sha256: str
    """``decoder_digest`` of the dictionary."""
    d_sae: int
    rows: int
    massive_rows: int
    """Rows that were left out as massive activations."""
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
    """Every score, and ``density``, of every latent [d_sae]; NaN where a latent has none."""
    resampled: Tensor = field(repr=False)
    """Detection of every latent [d_sae, resamplings] on resamplings of the text's documents, the
    same for all dictionaries."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the numbers per latent."""
        return plain({k: v for k, v in vars(self).items() if k not in ("per_latent", "resampled")})


@dataclass(frozen=True)
class MonosemanticReport:
    """Scores of several dictionaries on the same text."""

    model: dict[str, Any]
    corpus: dict[str, Any]
    config: dict[str, Any]
    num_contexts: int
    num_rows: int
    num_documents: int
    effective_documents: float
    """1/Σ share², where share is a document's part of the rows."""
    chance: dict[str, float]
    """``purity`` and ``entropy`` of as many random contexts as a latent has top contexts."""
    sites: dict[str, dict[str, Any]]
    """Per site, how well probes of the activations themselves do: ``means``, ``families`` and
    ``concepts``, each with the area under the ROC curve of probes on all dimensions (``dense``) and
    on the best ones (``best_1``, ``best_2``, ``best_5``), and the ``accuracy`` of dense probes."""
    dictionaries: dict[str, DictionaryScores]
    consistency: dict[str, dict[str, Any]]
    """For dictionaries that differ only in their seed: ``dictionaries``, ``pw_mcc``, and
    ``pw_mcc_alive`` over the latents that fired."""
    notes: list[str] = field(default_factory=list)
    text: str = "held-out text"
    """What was read, in words."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, the scores of every latent included; a number that does not exist is null."""
        found = {
            name: scores.to_dict()
            | {"per_latent": {k: _rounded(v) for k, v in scores.per_latent.items()}}
            for name, scores in self.dictionaries.items()
        }
        return plain(vars(self) | {"dictionaries": found})

    def table(self) -> str:
        """A table for people, with the meaning of each column below it."""
        numbers = {name: card_numbers(self, name) for name in self.dictionaries}
        rows = [
            [name, *(one.cell(own) for one in MONOSEMANTICITY)] for name, own in numbers.items()
        ]
        return Table(
            [["dictionary", *(one.title for one in MONOSEMANTICITY)], *rows],
            meanings={one.title: one.meaning for one in MONOSEMANTICITY},
            words=self._words(),
        ).text()

    def _words(self) -> list[str]:
        size = TextSize(self.num_rows, self.num_documents, self.effective_documents)
        lines = [
            f"{size.text(self.text)}, in {self.num_contexts:,} contexts; the purity of random "
            f"contexts is {self.chance['purity']:.3f}.",
        ]
        for site, found in self.sites.items():
            means = found["means"]
            lines.append(
                f"{site}: area under the ROC curve of probes on the activations themselves, mean "
                f"over families of {len(found['concepts'])} concepts: {means['dense']:.3f} from "
                f"all dimensions, {means['best_1']:.3f} from the best dimension, "
                f"{means['best_5']:.3f} from the best five."
            )
        for group, found in self.consistency.items():
            lines.append(
                f"{printable(group)}: agreement of {len(found['dictionaries'])} seeds (PW-MCC, "
                f"mean cosine of matched latents): {found['pw_mcc']:.3f} over all latents, "
                f"{found['pw_mcc_alive']:.3f} over those that fired."
            )
        return lines + [f"note: {note}" for note in self.notes]


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


def card_numbers(report: MonosemanticReport, name: str) -> dict[str, Any]:
    """The numbers of one dictionary, JSON-able: ``value`` with its 95 % ``interval`` and, where
    there is one, its ``control``: the purity of random contexts, or probes on the best
    dimensions."""
    scores = report.dictionaries[name]
    controls = {"purity": report.chance["purity"], **report.sites[scores.site]["means"]}
    letters = scores.concepts.families.get(LETTER)
    found: dict[str, Any] = {
        "eligible_share": scores.eligible_share,
        "selectivity_letters": letters["selectivity"] if letters else None,
    }
    for one in MONOSEMANTICITY:
        means = scores.latents if one.source == "latents" else scores.concepts.means
        if (mean := means.get(one.name)) is not None:
            found[one.key] = {"value": mean.mean, "interval": mean.interval}
            if one.name in controls:
                found[one.key]["control"] = controls[one.name]
    found["detection_without_tokens"]["share"] = scores.latents["detection_without_tokens"].share
    return plain(found)
