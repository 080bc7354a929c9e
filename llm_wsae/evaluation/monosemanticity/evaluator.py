"""Are the latents of dictionaries monosemantic? Measured on held-out text, without an LLM judge.

Two kinds of evidence, which can disagree and are therefore reported together: latents one by one
(``latents``: do the tokens and texts on which a latent fires have something in common?) and
concepts with known truth (``probing``: does a latent stand for a concept, and for nothing else?).
The forward pass, the embeddings of windows and the probes of the activations are shared by all
dictionaries, together or one after the other.

Concepts come in families of very different size (first letters of words are two thirds of them),
and what happens to one letter happens to the others. So a mean over concepts is the mean of its
families' means, and its interval is a t-interval over families: they are the sample.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import special
from torch import Tensor

from llm_wsae.artifact.provenance import plain
from llm_wsae.data.config import PackConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.dictionary.dictionary import DENSE_DENSITY, Dictionary
from llm_wsae.evaluation.checks import check_fit, notes_on_weights
from llm_wsae.evaluation.config import MonosemanticConfig
from llm_wsae.evaluation.heldout import (
    ActivationCache,
    Encoder,
    HeldoutText,
    WindowEmbeddings,
    on_device_of,
)
from llm_wsae.evaluation.monosemanticity.concepts import concepts_of, folded_tokens
from llm_wsae.evaluation.monosemanticity.latents import (
    RESAMPLED,
    Firings,
    LatentScorer,
    read_units,
)
from llm_wsae.evaluation.monosemanticity.probing import SiteProbes, probe_latents, probe_site
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.sentence_encoder import SentenceEncoder
from llm_wsae.model.site import Site
from llm_wsae.statistics.measures import LETTER, MONOSEMANTICITY
from llm_wsae.statistics.uncertainty import LEVEL, Bootstrap, Interval, TextSize
from llm_wsae.terminal import Table


@dataclass(frozen=True)
class Mean:
    """A mean over the latents, or concepts, that have the score."""

    mean: float
    interval: Interval  # its 95 % interval: by resampling latents, or over families of concepts
    count: int
    share: float  # ``count`` as a share of all latents, or of all concepts


_NONE = Mean(math.nan, (math.nan, math.nan), 0, 0.0)


@dataclass(frozen=True)
class ConceptSummary:
    """Scores on concepts."""

    means: dict[str, Mean]  # in which every family counts once
    families: dict[str, dict[str, float]]
    concepts: dict[str, dict[str, float]]


@dataclass(frozen=True)
class DictionaryScores:
    """Scores of one dictionary."""

    name: str
    site: str
    sha256: str  # ``decoder_digest`` of the dictionary
    d_sae: int
    rows: int
    massive_rows: int  # rows that were left out as massive activations
    eligible_share: float
    dead_share: float
    dense_share: float
    l0: float
    latents: dict[str, Mean]  # means of the scores of ``latents`` over the eligible latents
    concepts: ConceptSummary
    concepts_not_dense: ConceptSummary
    """Where latents that fire on more than 10 % of the rows are not chosen for concepts."""
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
    effective_documents: float  # 1/Σ share², where share is a document's part of the rows
    chance: dict[str, float]  # ``purity`` of as many random contexts as a latent has top contexts
    sites: dict[str, dict[str, Any]]
    """Per site, how well probes of the activations themselves do (``probing.SiteProbes``):
    ``means``, ``families`` and ``concepts``."""
    dictionaries: dict[str, DictionaryScores]
    notes: list[str] = field(default_factory=list)
    text: str = "held-out text"  # what was read, in words

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, the scores of every latent included; a number that does not exist is null."""
        found = {}
        for name, scores in self.dictionaries.items():
            columns = {key: one.tolist() for key, one in scores.per_latent.items()}
            rounded = {key: [round(one, 5) for one in own] for key, own in columns.items()}
            found[name] = scores.to_dict() | {"per_latent": rounded}
        return plain(vars(self) | {"dictionaries": found})

    def table(self) -> str:
        """A table for people, with the meaning of each column below it."""
        rows = [["dictionary", *(one.title for one in MONOSEMANTICITY)]]
        for name in self.dictionaries:
            numbers = card_numbers(self, name)
            rows.append([name, *(one.cell(numbers) for one in MONOSEMANTICITY)])
        meanings = {one.title: one.meaning for one in MONOSEMANTICITY}
        size = TextSize(self.num_rows, self.num_documents, self.effective_documents)
        words = [
            f"{size.text(self.text)}, in {self.num_contexts:,} contexts; the purity of random "
            f"contexts is {self.chance['purity']:.3f}.",
        ]
        for site, found in self.sites.items():
            means = found["means"]
            words.append(
                f"{site}: area under the ROC curve of probes on the activations themselves, mean "
                f"over families of {len(found['concepts'])} concepts: {means['dense']:.3f} from "
                f"all dimensions, {means['best_1']:.3f} from the best dimension, "
                f"{means['best_5']:.3f} from the best five."
            )
        words += [f"note: {note}" for note in self.notes]
        return Table(rows, meanings=meanings, words=words).text()


class MonosemanticityEvaluator:
    """A text on which dictionaries are scored, read once."""

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        packing: PackConfig,
        config: MonosemanticConfig,
        encoder: Encoder | None = None,
    ):
        """Contexts are packed as ``packing`` says; ``encoder`` replaces ``config.encoder``. Raises
        UsageError if the encoder is not available or a label is unknown; LlmWsaeError if the text
        is too short."""
        if encoder is None:
            encoder = SentenceEncoder.load(config.encoder, device=model.device.type)
        blocks = Packer.for_model(model, packing).blocks(corpus, block_size=64)
        text = HeldoutText.take(blocks, config.tokens, config.labels)
        self._model, self._config, self._corpus = model, config, corpus.identity()
        self._activations = ActivationCache(model, text.ids, text.keep, config.batch_tokens)
        tokens = folded_tokens(text, model.tokenizer)
        embeddings = WindowEmbeddings(text, model.tokenizer, encoder, config.before, config.after)
        self._scorer = LatentScorer(text, tokens, embeddings, config)
        found = concepts_of(text, model.tokenizer, config)
        self._kinds, self._concepts = [units for units, _ in found], [own for _, own in found]
        self._names = [name for one in self._concepts for name in one.names]
        self._families = [family for one in self._concepts for family in one.families]
        self._probes: dict[tuple[Site, float], SiteProbes] = {}

    def score(self, dictionaries: Mapping[str, Dictionary]) -> MonosemanticReport:
        """Score dictionaries, by name, of any sites, in one pass over the text. Raises UsageError
        if there is none or one does not fit the model."""
        check_fit(dictionaries, self._model, "score")
        by_site: dict[Site, list[Dictionary]] = defaultdict(list)
        for one in dictionaries.values():
            by_site[one.site.reads].append(one)
        thresholds = {
            site: self._activations.massive_threshold(site, own)
            for site, own in sorted(by_site.items(), key=lambda item: item[0])
        }
        new = {site: at for site, at in thresholds.items() if (site, at) not in self._probes}
        for site, x in read_units(self._activations, new, self._kinds).items() if new else ():
            self._probes[site, new[site]] = probe_site(self._concepts, x, self._config.seed)
        probes = {site: self._probes[site, at] for site, at in thresholds.items()}
        here = {name: on_device_of(self._model, one) for name, one in dictionaries.items()}
        recorders = {
            name: self._scorer.recorder(one, thresholds[one.site.reads], self._kinds)
            for name, one in here.items()
        }
        for batch in self._activations.rows(list(thresholds)):
            for recorder in recorders.values():
                recorder.add(batch)
        scores = {
            name: self._scores(name, recorder.finished(), probes[recorder.dictionary.site.reads])
            for name, recorder in recorders.items()
        }
        return self._report(dictionaries, scores, probes)

    def _scores(self, name: str, firings: Firings, site_probes: SiteProbes) -> DictionaryScores:
        dictionary, density = firings.dictionary, firings.density
        scores, dense = self._scorer.scores(firings), density > DENSE_DENSITY
        eligible = ~scores["purity"].isnan()
        resampled = scores.pop(RESAMPLED)
        allowed = [torch.ones_like(dense), *([~dense] if bool(dense.any()) else [])]
        decoder = dictionary.W_dec.detach().cpu()
        probed = probe_latents(site_probes, firings.tables(), decoder, allowed)
        concepts = [summarise(self._names, self._families, columns) for columns in probed]
        draws = (self._config.bootstraps, self._config.seed)
        return DictionaryScores(
            name=name,
            site=str(dictionary.site),
            sha256=dictionary.decoder_digest(),
            d_sae=dictionary.d_sae,
            rows=firings.num_rows,
            massive_rows=self._scorer.text.num_rows - firings.num_rows,
            eligible_share=float(eligible.double().mean()),
            dead_share=float((firings.counts == 0).double().mean()),
            dense_share=float(dense.double().mean()),
            l0=float(density.sum()),
            latents=latent_means(scores, eligible, resampled, *draws),
            concepts=concepts[0],
            concepts_not_dense=concepts[-1],
            per_latent={**scores, "density": density},
            resampled=resampled,
        )

    def _report(
        self,
        dictionaries: Mapping[str, Dictionary],
        scores: dict[str, DictionaryScores],
        probes: Mapping[Site, SiteProbes],
    ) -> MonosemanticReport:
        text = self._scorer.text
        size = TextSize.of(text.document_of.numpy())
        sites = {}
        for site, of_site in probes.items():
            found = summarise(self._names, self._families, of_site.columns)
            means = {key: one.mean for key, one in found.means.items()}
            sites[str(site)] = vars(found) | {"means": means}
        notes = [] if self._names else ["the text holds too few examples of any concept"]
        notes += [
            f"the text holds too few documents of any value of the label {label}"
            for label in dict.fromkeys(self._config.labels)
            if label not in self._families
        ]
        return MonosemanticReport(
            model=self._model.identity(),
            corpus=self._corpus,
            config=asdict(self._config),
            num_contexts=text.num_contexts,
            num_rows=text.num_rows,
            num_documents=size.documents,
            effective_documents=size.effective,
            chance={"purity": self._scorer.chance()},
            sites=sites,
            dictionaries=scores,
            notes=[*notes_on_weights(dictionaries, self._model), *notes, *size.warnings()],
        )


def card_numbers(report: MonosemanticReport, name: str) -> dict[str, Any]:
    """The numbers of one dictionary, as a ``Measure`` reads them, JSON-able. ``control`` is the
    purity of random contexts, or probes on the best dimensions."""
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


def mean_of(values: Float[Tensor, " items"], bootstrap: Bootstrap, total: int) -> Mean:
    """Mean and interval of the values that are not NaN, out of ``total`` latents or concepts;
    ``bootstrap`` resamples the items."""
    there = ~values.isnan()
    count = int(there.sum())
    if not count:
        return _NONE
    sums = {"sum": values.where(there, 0.0).double().numpy(), "count": there.double().numpy()}
    interval = bootstrap.interval(lambda drawn: drawn["sum"] / drawn["count"], sums)
    return Mean(float(values[there].double().mean()), interval, count, count / total)


def mean_of_families(values: Float[Tensor, " concepts"], families: Sequence[str]) -> Mean:
    """Mean over families of the mean of their concepts that are not NaN. The interval is Student's
    over the families; over the concepts where there is one family, NaN where there is one concept.
    """
    by_family: dict[str, list[float]] = {}
    for value, family in zip(values.double().tolist(), families, strict=True):
        if not math.isnan(value):
            by_family.setdefault(family, []).append(value)
    if not by_family:
        return _NONE
    parts = np.array([float(np.mean(own)) for own in by_family.values()])
    if len(parts) == 1:
        (own,) = by_family.values()
        parts = np.array(own)
    mean, half = float(parts.mean()), math.nan
    if len(parts) > 1:
        error = float(parts.std(ddof=1)) / math.sqrt(len(parts))
        half = float(special.stdtrit(len(parts) - 1, (1 + LEVEL) / 2)) * error
    count = sum(map(len, by_family.values()))
    return Mean(mean, (mean - half, mean + half), count, count / len(values))


def latent_means(
    scores: dict[str, Float[Tensor, " d_sae"]],
    eligible: Bool[Tensor, " d_sae"],
    resampled: Float[Tensor, "d_sae documents"],
    resamplings: int,
    seed: int,
) -> dict[str, Mean]:
    """Means of every score over the eligible latents. The interval of detection also covers the
    choice of documents: ``resampled`` is each latent's detection on resamplings of them."""
    bootstrap = Bootstrap(max(int(eligible.sum()), 1), resamplings, seed)
    total = len(eligible)
    found = {name: mean_of(values[eligible], bootstrap, total) for name, values in scores.items()}
    one, values = found["detection"], scores["detection"][eligible]
    values = values[~values.isnan()]
    drawn = resampled[eligible].nanmean(0)
    drawn = drawn[~drawn.isnan()]  # one may lack the documents of every latent
    known = len(values) > 1 and len(drawn) > 1
    squared = float(drawn.var() + values.var() / len(values)) if known else math.nan
    half = float(special.ndtri((1 + LEVEL) / 2)) * math.sqrt(squared)
    found["detection"] = replace(one, interval=(one.mean - half, one.mean + half))
    return found


def summarise(
    names: Sequence[str], families: Sequence[str], columns: Mapping[str, Float[Tensor, " concepts"]]
) -> ConceptSummary:
    """Means over all families and over each of them."""
    means = {key: mean_of_families(values, families) for key, values in columns.items()}
    of_families = {}
    for family in dict.fromkeys(families):
        mine = torch.tensor([one == family for one in families])
        of_families[family] = {key: float(own[mine].nanmean()) for key, own in columns.items()}
    rows = {key: values.tolist() for key, values in columns.items()}
    concepts = {name: {key: own[n] for key, own in rows.items()} for n, name in enumerate(names)}
    return ConceptSummary(means, of_families, concepts)
