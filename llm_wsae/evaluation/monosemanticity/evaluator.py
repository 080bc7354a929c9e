"""Are the latents of dictionaries monosemantic? Measured on held-out text, without an LLM judge.

Three kinds of evidence, which can disagree and are therefore reported together:

- latents one by one (``latent_scores``): do the tokens and texts on which a latent fires have
  something in common?
- concepts with known truth (``concept_scores``): does a latent stand for a concept, and for nothing
  else?
- other seeds (``pw_mcc``): are the same latents found again?

A ``MonosemanticityEvaluator`` reads the text once: the forward pass, the embeddings of windows and
the probes of the activations are shared by all dictionaries, together or one after the other.
"""

import copy
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from llm_wsae.data.config import PackConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.dictionary.dictionary import DENSE_DENSITY, Dictionary
from llm_wsae.evaluation.activations import massive_thresholds
from llm_wsae.evaluation.checks import check_fit, common_packing, notes_on_weights
from llm_wsae.evaluation.config import MonosemanticConfig
from llm_wsae.evaluation.heldout import HeldoutActivations, HeldoutText
from llm_wsae.evaluation.monosemanticity.averages import (
    ConceptSummary,
    latent_means,
    summarise_concepts,
    summarise_site,
)
from llm_wsae.evaluation.monosemanticity.concept_scores import (
    LatentTables,
    ProbedConcepts,
    SiteProbes,
    probe_latents,
    probe_site,
)
from llm_wsae.evaluation.monosemanticity.concepts import (
    document_concepts,
    halves_of_documents,
)
from llm_wsae.evaluation.monosemanticity.latent_scores import RESAMPLED, LatentScorer
from llm_wsae.evaluation.monosemanticity.recording import Recorder, read_units, record
from llm_wsae.evaluation.monosemanticity.report import DictionaryScores, MonosemanticReport
from llm_wsae.evaluation.monosemanticity.token_concepts import (
    folded_tokens,
    token_concepts,
)
from llm_wsae.evaluation.monosemanticity.unit_tables import (
    NO_UNIT,
    Units,
    units_of_documents,
    units_of_tokens,
)
from llm_wsae.evaluation.monosemanticity.window_embeddings import (
    Encoder,
    WindowEmbeddings,
)
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.sentence_encoder import SentenceEncoder
from llm_wsae.model.site import Site
from llm_wsae.statistics.documents import TextSize

_MOST_PAIRS = 2**27  # a gigabyte of cosines; with more, the matching takes hours too


def monosemanticity(
    dictionaries: Mapping[str, Dictionary],
    model: LanguageModel,
    corpus: Corpus,
    config: MonosemanticConfig,
    encoder: Encoder | None = None,
) -> MonosemanticReport:
    """Score dictionaries, by name, on the text of ``corpus`` (usually its held-out part).

    They may belong to several sites. ``encoder`` replaces ``config.encoder``.

    Raises UsageError if there is no dictionary, one does not fit the model, they were trained on
    differently packed text, the encoder is not available or a label is unknown; LlmWsaeError if the
    text is too short.
    """
    check_fit(dictionaries, model, "score")
    packing = common_packing(dictionaries, model.max_context)
    return MonosemanticityEvaluator(model, corpus, packing, config, encoder).score(dictionaries)


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
        """Raises as ``monosemanticity`` does."""
        if encoder is None:
            encoder = SentenceEncoder.load(config.encoder, device=model.device.type)
        blocks = Packer.for_model(model, packing).blocks(corpus, block_size=64)
        text = HeldoutText.take(blocks, config.tokens, config.labels)
        self._model = model
        self._corpus = corpus.identity()
        self._config = config
        self._activations = HeldoutActivations(model, text, config.batch_tokens)
        tokens = folded_tokens(text, model.tokenizer)
        embeddings = WindowEmbeddings(text, model.tokenizer, encoder, config.before, config.after)
        self._scorer = LatentScorer.of(text, tokens, embeddings, config)
        self._concepts = _concepts(text, model.tokenizer, config)
        self._probes: dict[tuple[Site, float], SiteProbes] = {}

    def score(self, dictionaries: Mapping[str, Dictionary]) -> MonosemanticReport:
        """Score dictionaries by name. Raises as ``monosemanticity`` does."""
        check_fit(dictionaries, self._model, "score")
        by_site: dict[Site, list[Dictionary]] = defaultdict(list)
        for dictionary in dictionaries.values():
            by_site[dictionary.site].append(dictionary)
        thresholds = massive_thresholds(by_site, self._activations.cache)
        probes = self._site_probes(thresholds)
        scores: dict[str, DictionaryScores] = {}
        for group in self._groups(dictionaries):
            for name, recorder in self._record(group, thresholds).items():
                scores[name] = self._scores(name, recorder, probes[recorder.dictionary.site])
        return self._report(dictionaries, scores, probes)

    def _site_probes(self, thresholds: Mapping[Site, float]) -> dict[Site, SiteProbes]:
        """Probes of the activations at every site, each trained once."""
        new = {s: at for s, at in sorted(thresholds.items()) if (s, at) not in self._probes}
        kinds = [asked.units for asked in self._concepts]
        for site, x in read_units(self._activations, new, kinds).items() if new else ():
            self._probes[site, new[site]] = probe_site(self._concepts, x)
        return {site: self._probes[site, at] for site, at in thresholds.items()}

    def _groups(self, dictionaries: Mapping[str, Dictionary]) -> list[dict[str, Dictionary]]:
        """Dictionaries to record together: each alone, which takes the least memory, if the
        activations are cached; otherwise all in one pass."""
        sites = {dictionary.site for dictionary in dictionaries.values()}
        if self._activations.cache.holds(sites):
            return [{name: dictionary} for name, dictionary in dictionaries.items()]
        return [dict(dictionaries)]

    def _record(
        self, dictionaries: Mapping[str, Dictionary], thresholds: Mapping[Site, float]
    ) -> dict[str, Recorder]:
        device, kinds = self._model.device, [asked.units for asked in self._concepts]
        recorders = {}
        for name, dictionary in dictionaries.items():
            if dictionary.W_enc.device != device:
                dictionary = copy.deepcopy(dictionary).to(device)
            collector = self._scorer.collector(dictionary.d_sae, device)
            threshold = thresholds[dictionary.site]
            recorders[name] = Recorder(dictionary, collector, threshold, kinds)
        record(self._activations, list(recorders.values()))
        return recorders

    def _scores(self, name: str, recorder: Recorder, site_probes: SiteProbes) -> DictionaryScores:
        dictionary, firings, config = recorder.dictionary, recorder.firings(), self._config
        density = firings.density
        dense = density > DENSE_DENSITY
        eligible = self._scorer.eligible(firings)
        scores = self._scorer.scores(firings)
        resampled = scores.pop(RESAMPLED)
        decoder = dictionary.W_dec.detach().cpu()
        latents = LatentTables.of(self._concepts, recorder.tables(), decoder, density)
        draws = (config.bootstraps, config.seed)

        def concepts(allowed: Tensor) -> ConceptSummary:
            probes = probe_latents(self._concepts, site_probes, latents, allowed)
            return summarise_concepts(*_names(self._concepts), probes)

        with_all = concepts(torch.ones_like(dense))
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
            latents_not_dense=latent_means(scores, eligible & ~dense, resampled, *draws),
            concepts=with_all,
            concepts_not_dense=concepts(~dense) if bool(dense.any()) else with_all,
            per_latent={**scores, "density": density},
            resampled=resampled,
        )

    def _report(
        self,
        dictionaries: Mapping[str, Dictionary],
        scores: Mapping[str, DictionaryScores],
        probes: Mapping[Site, SiteProbes],
    ) -> MonosemanticReport:
        text, names = self._scorer.text, _names(self._concepts)
        size = TextSize.of(text.document_of.numpy())
        return MonosemanticReport(
            model=self._model.identity(),
            corpus=self._corpus,
            config=asdict(self._config),
            num_contexts=text.num_contexts,
            num_rows=text.num_rows,
            num_documents=size.documents,
            effective_documents=size.effective,
            chance=self._scorer.chance(),
            sites={str(site): summarise_site(*names, found) for site, found in probes.items()},
            dictionaries={name: scores[name] for name in dictionaries},
            consistency=_consistency(dictionaries, scores),
            notes=[
                *_notes(dictionaries, self._model, names, self._config.labels),
                *size.warnings(),
            ],
        )


def _concepts(
    text: HeldoutText, tokenizer: Any, config: MonosemanticConfig
) -> list[ProbedConcepts]:
    """The concepts of tokens and of documents; a kind of units without concepts is dropped."""
    halves = halves_of_documents(text, config.seed)

    def half(units: Units) -> Tensor:
        halved = [halves[number] for number in units.document.tolist()]
        return torch.tensor(halved, dtype=torch.bool)

    tokens = units_of_tokens(text, config.probe_tokens, config.seed)
    rows = (tokens.of_row != NO_UNIT).nonzero()[:, 0]
    contexts = units_of_documents(text, config.seed)
    asked = [
        (tokens, token_concepts(text, tokenizer, rows, half(tokens))),
        (
            contexts,
            document_concepts(text.headers, contexts.document, half(contexts), config.labels),
        ),
    ]
    return [ProbedConcepts.of(units, found, config.seed) for units, found in asked if found.names]


def _names(concepts: list[ProbedConcepts]) -> tuple[list[str], list[str]]:
    """Names and families of all concepts."""
    return (
        [name for asked in concepts for name in asked.concepts.names],
        [family for asked in concepts for family in asked.concepts.families],
    )


def _consistency(
    dictionaries: Mapping[str, Dictionary], scores: Mapping[str, DictionaryScores]
) -> dict[str, dict[str, Any]]:
    """PW-MCC of every group of dictionaries that differ only in their seeds."""
    groups: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for name, dictionary in dictionaries.items():
        info = dictionary.info
        if info.seed is not None:
            arm = info.name.removesuffix(f"-s{info.seed}")
            groups[f"{info.site} {arm}", _made_alike(dictionary)].setdefault(info.seed, name)
    result = {}
    for (group, _), members in groups.items():
        if len(members) < 2:
            continue
        if group in result:  # the same arm in another training
            group = f"{group} ({', '.join(members.values())})"
        names = [members[seed] for seed in sorted(members)]
        decoders = [dictionaries[name].W_dec.detach() for name in names]
        alive = [scores[name].per_latent["density"] > 0 for name in names]
        result[group] = {
            "dictionaries": names,
            "pw_mcc": pw_mcc(decoders),
            "pw_mcc_alive": pw_mcc(decoders, alive),
        }
    return result


def _made_alike(dictionary: Dictionary) -> str:
    """What is equal between two dictionaries that differ only in their seeds."""
    info = dictionary.info
    training = {k: v for k, v in info.training.items() if k not in ("seed", "command", "versions")}
    return json.dumps([dictionary.d_sae, info.store, training], sort_keys=True, default=str)


def _notes(
    dictionaries: Mapping[str, Dictionary],
    model: LanguageModel,
    names: tuple[list[str], list[str]],
    labels: tuple[str, ...],
) -> list[str]:
    notes = notes_on_weights(dictionaries, model)
    concepts, families = names
    if not concepts:
        notes.append("the text holds too few examples of any concept")
    for label in dict.fromkeys(labels):
        if label not in families:
            notes.append(f"the text holds too few documents of any value of the label {label}")
    return notes


def matched_cosine(one: Float[Tensor, "d_one d_in"], other: Float[Tensor, "d_other d_in"]) -> float:
    """Mean cosine of the rows, matched one to one; unmatched rows do not count. NaN without rows.

    For more than 2²⁷ pairs (11,585 rows each), only that many pairs are used, with rows of ``one``
    drawn at random: the mean is then slightly too high, because fewer rows compete.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    most = max(1, _MOST_PAIRS // max(1, len(other)))
    if len(one) > most:
        drawn = torch.randperm(len(one), generator=torch.Generator().manual_seed(0))[:most]
        one = one[drawn.to(one.device)]
    cosines = (normalize(one, dim=1) @ normalize(other, dim=1).T).cpu().double().numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return float(cosines[rows, columns].mean()) if len(rows) else float("nan")


def pw_mcc(
    decoders: Sequence[Float[Tensor, "_ d_in"]],
    alive: Sequence[Bool[Tensor, " _"]] | None = None,
) -> float:
    """PW-MCC of decoders, over their ``alive`` latents only if given (dead latents match nothing).

    PW-MCC is the pairwise mean correlation coefficient of Song et al. 2025 (arXiv 2505.20254): the
    latents of two dictionaries are matched one to one so that the sum of the cosines of their
    decoder rows is largest (the Hungarian method); the mean cosine is averaged over all pairs of
    dictionaries. It is 1 for the same latents in any order.

    NaN for fewer than two decoders.
    """
    if alive is not None:
        decoders = [decoder[some] for decoder, some in zip(decoders, alive, strict=True)]
    found = [matched_cosine(one, other) for one, other in combinations(decoders, 2)]
    return sum(found) / len(found) if found else float("nan")
