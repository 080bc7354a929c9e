"""What was found about the monosemanticity of dictionaries: one JSON object, one table."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_wsae.artifact.files import write_json
from llm_wsae.artifact.provenance import plain
from llm_wsae.evaluation.monosemanticity.averages import ConceptSummary, Mean
from llm_wsae.evaluation.monosemanticity.latent_scores import SCORES
from llm_wsae.evaluation.monosemanticity.token_concepts import LETTER
from llm_wsae.statistics.documents import TextSize
from llm_wsae.terminal import aligned, printable

COLUMNS = {
    "eligible %": "latents that fire in enough contexts to be scored; the next four columns are "
    "means over them",
    "purity": SCORES["purity"],
    "coherence": SCORES["coherence"],
    "detection": SCORES["detection"] + "; with its 95 % interval over latents and documents",
    "no token": SCORES["detection_without_tokens"] + " (share of all latents that have this score)",
    "probe 1": "area under the ROC curve when a concept is predicted from its best latent, mean "
    "over families of concepts (0.5: chance; 1: perfect)",
    "probe 5": "the same from the best five latents",
    "selective": "drop in accuracy of a concept's dense probe when its best five latents are "
    "removed, minus the mean drop of the other concepts' probes; mean over families of concepts, "
    "with its 95 % interval over them (higher is better)",
    "letters": "the same over first letters of words alone, one of those families",
    "spill": "drop in accuracy of the five other concepts' probes that are hit hardest, when the "
    "own has dropped by 0.05; mean over families, with its 95 % interval (lower is better)",
    "absorbed %": "words whose first letter the activations show, while its latents are silent and "
    "one other latent speaks for it; mean over letters, with its 95 % interval over them (lower is "
    "better; by probes of our own, not SAEBench's number)",
    "dense %": "latents that fire on more than 10 % of the tokens",
}


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

    def write(self, path: Path) -> None:
        """Write the JSON report. Raises LlmWsaeError if that is impossible."""
        write_json(path, self.to_dict())

    def table(self) -> str:
        """A table for people, with the meaning of each column below it."""
        rows = [[name, *_cells(scores)] for name, scores in self.dictionaries.items()]
        width = max(map(len, COLUMNS))
        size = TextSize(self.num_rows, self.num_documents, self.effective_documents)
        lines = [aligned([["dictionary", *COLUMNS], *rows], left=1), ""]
        lines += [f"{name.ljust(width)}  {meaning}" for name, meaning in COLUMNS.items()]
        lines += [
            "",
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
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


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
        _NONE if (letters := _letters(scores)) is None else f"{letters:.3f}",
        shown(concepts["spill"], interval=True),
        _absorbed(concepts["absorbed"]),
        f"{100 * scores.dense_share:.1f}",
    ]


def _letters(scores: DictionaryScores) -> float | None:
    """Selectivity of first letters alone."""
    letters = scores.concepts.families.get(LETTER)
    return letters["selectivity"] if letters else None


def _absorbed(mean: Mean) -> str:
    if not mean.count:
        return _NONE
    low, high = mean.interval
    return f"{100 * mean.mean:.1f} [{100 * max(low, 0):.1f}, {100 * high:.1f}]"


_NONE = "–"
_OF_LATENTS = ("purity", "coherence", "detection", "detection_without_tokens")
_OF_CONCEPTS = {"probe_1": "best_1", "probe_5": "best_5"} | {
    key: key for key in ("selectivity", "spill", "absorbed")
}


def card_numbers(report: MonosemanticReport, name: str) -> dict[str, Any]:
    """The numbers of one dictionary, JSON-able: ``value`` with its 95 % ``interval`` and, where
    there is one, its ``control``: the purity of random contexts, or probes on the best
    dimensions."""
    scores = report.dictionaries[name]
    dimensions = report.sites[scores.site]["means"]
    controls = {"purity": report.chance["purity"]}
    controls |= {key: dimensions[key] for key in _OF_CONCEPTS.values() if key in dimensions}

    def entry(key: str, mean: Mean) -> dict[str, Any]:
        control = {"control": controls[key]} if key in controls else {}
        return {"value": mean.mean, "interval": mean.interval, **control}

    return plain(
        {
            "eligible_share": scores.eligible_share,
            **{key: entry(key, scores.latents[key]) for key in _OF_LATENTS},
            **{name: entry(key, scores.concepts.means[key]) for name, key in _OF_CONCEPTS.items()},
            "selectivity_letters": _letters(scores),
        }
    )
