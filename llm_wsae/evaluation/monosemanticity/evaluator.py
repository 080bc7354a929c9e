"""Are the latents of dictionaries monosemantic? Measured on held-out text, without an LLM judge.

Latents one by one (``latent_scores``): do the tokens and texts that a latent fires on have
something in common? Concepts with known truth (``concept_scores``): does a latent stand for a
concept, and for nothing else? And across seeds (``seeds``): are they found again? The three can
disagree, so they are reported side by side.

A ``MonosemanticityEvaluator`` reads the text once: forward pass, embeddings of windows and probes
of the activations are shared by all dictionaries that it is given, together or one by one.
"""

import copy
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from llm_wsae.data.config import PackConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.evaluation.checks import check_fit, notes_on_weights
from llm_wsae.evaluation.fidelity.reconstruction import DENSE_DENSITY
from llm_wsae.evaluation.heldout import Activations, HeldoutText
from llm_wsae.evaluation.monosemanticity.concept_scores import (
    Latents,
    Questions,
    SiteProbes,
    probe_latents,
    probe_site,
)
from llm_wsae.evaluation.monosemanticity.concepts import document_concepts, halves_of_documents
from llm_wsae.evaluation.monosemanticity.config import MonosemanticConfig
from llm_wsae.evaluation.monosemanticity.contexts import packing_of
from llm_wsae.evaluation.monosemanticity.latent_scores import Judge
from llm_wsae.evaluation.monosemanticity.probe_tables import (
    NO_UNIT,
    Units,
    units_of_documents,
    units_of_tokens,
)
from llm_wsae.evaluation.monosemanticity.recording import Recorder, SiteRows, read_sites, record
from llm_wsae.evaluation.monosemanticity.report import (
    ConceptSummary,
    DictionaryScores,
    MonosemanticReport,
    latent_means,
    summarise_concepts,
    summarise_site,
)
from llm_wsae.evaluation.monosemanticity.seed_consistency import pw_mcc
from llm_wsae.evaluation.monosemanticity.token_concepts import folded_tokens, token_concepts
from llm_wsae.evaluation.monosemanticity.windows import Encoder, WindowEmbeddings
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.sentence_encoder import SentenceEncoder
from llm_wsae.model.site import Site


def monosemanticity(
    dictionaries: Mapping[str, Dictionary],
    model: LanguageModel,
    corpus: Corpus,
    config: MonosemanticConfig,
    encoder: Encoder | None = None,
) -> MonosemanticReport:
    """Score dictionaries, by name, on the text of ``corpus`` (its held-out part, as a rule).

    They may belong to several sites. ``encoder`` takes the place of ``config.encoder``.

    Raises UsageError if there is no dictionary, one does not fit the model, they were trained on
    differently packed text, the encoder is not there or a label is unknown; LlmWsaeError if the
    text is too short.
    """
    check_fit(dictionaries, model, "score")
    return MonosemanticityEvaluator(model, corpus, packing_of(dictionaries), config, encoder).score(
        dictionaries
    )


class MonosemanticityEvaluator:
    """A text to score dictionaries on, read once."""

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
        self._activations = Activations(model, text, config.batch_tokens)
        tokens = folded_tokens(text, model.tokenizer)
        embeddings = WindowEmbeddings(text, model.tokenizer, encoder, config.before, config.after)
        self._judge = Judge.of(text, tokens, embeddings, config)
        self._questions = _questions(text, model.tokenizer, config)
        self._sites: dict[Site, tuple[SiteRows, SiteProbes]] = {}

    def score(self, dictionaries: Mapping[str, Dictionary]) -> MonosemanticReport:
        """Score dictionaries by name. Raises as ``monosemanticity`` does."""
        check_fit(dictionaries, self._model, "score")
        self._prepare(sorted({dictionary.site for dictionary in dictionaries.values()}))
        found: dict[str, DictionaryScores] = {}
        for group in self._groups(dictionaries):
            for name, recorder in self._record(group).items():
                found[name] = self._scores(name, recorder)
        return self._report(dictionaries, found)

    def _prepare(self, sites: list[Site]) -> None:
        """Read the activations of sites that are new, and probe them."""
        new = [site for site in sites if site not in self._sites]
        kinds = [asked.units for asked in self._questions]
        for site, rows in read_sites(self._activations, new, kinds).items() if new else ():
            self._sites[site] = (rows, probe_site(self._questions, rows.x))

    def _groups(self, dictionaries: Mapping[str, Dictionary]) -> list[dict[str, Dictionary]]:
        """Dictionaries to record together: each alone if the activations are at hand, which takes
        the least memory, else all in one pass."""
        sites = {dictionary.site for dictionary in dictionaries.values()}
        if self._activations.at_hand(sites):
            return [{name: dictionary} for name, dictionary in dictionaries.items()]
        return [dict(dictionaries)]

    def _record(self, dictionaries: Mapping[str, Dictionary]) -> dict[str, Recorder]:
        device, kinds = self._model.device, [asked.units for asked in self._questions]
        recorders = {}
        for name, dictionary in dictionaries.items():
            if dictionary.W_enc.device != device:
                dictionary = copy.deepcopy(dictionary).to(device)
            rows, _ = self._sites[dictionary.site]
            collector = self._judge.collector(dictionary.d_sae, device)
            recorders[name] = Recorder(dictionary, collector, rows.threshold, kinds)
        record(self._activations, list(recorders.values()))
        return recorders

    def _scores(self, name: str, recorder: Recorder) -> DictionaryScores:
        dictionary, firings, config = recorder.dictionary, recorder.firings(), self._config
        density = firings.density
        dense = density > DENSE_DENSITY
        eligible = self._judge.eligible(firings)
        scores = self._judge.scores(firings)
        _, site = self._sites[dictionary.site]
        decoder = dictionary.W_dec.detach().cpu()
        latents = Latents.of(self._questions, recorder.tables(), decoder, density)
        draws = (config.bootstraps, config.seed)

        def concepts(allowed: Tensor) -> ConceptSummary:
            probes = probe_latents(self._questions, site, latents, allowed)
            return summarise_concepts(*_names(self._questions), probes, *draws)

        everything = concepts(torch.ones_like(dense))
        return DictionaryScores(
            name=name,
            site=str(dictionary.site),
            d_sae=dictionary.d_sae,
            rows=firings.num_rows,
            massive_rows=self._judge.text.num_rows - firings.num_rows,
            eligible_share=float(eligible.double().mean()),
            dead_share=float((firings.counts == 0).double().mean()),
            dense_share=float(dense.double().mean()),
            l0=float(density.sum()),
            latents=latent_means(scores, eligible, *draws),
            latents_not_dense=latent_means(scores, eligible & ~dense, *draws),
            concepts=everything,
            concepts_not_dense=concepts(~dense) if bool(dense.any()) else everything,
            per_latent={**scores, "density": density},
        )

    def _report(
        self, dictionaries: Mapping[str, Dictionary], found: dict[str, DictionaryScores]
    ) -> MonosemanticReport:
        text, names = self._judge.text, _names(self._questions)
        sites = dict.fromkeys(str(dictionary.site) for dictionary in dictionaries.values())
        return MonosemanticReport(
            model=self._model.identity(),
            corpus=self._corpus,
            config=asdict(self._config),
            num_contexts=text.num_contexts,
            num_rows=text.num_rows,
            num_documents=len(text.headers),
            chance=self._judge.chance(),
            sites={
                site: summarise_site(*names, self._sites[Site.parse(site)][1]) for site in sites
            },
            dictionaries={name: found[name] for name in dictionaries},
            consistency=_consistency(dictionaries, found),
            notes=_notes(dictionaries, self._model, names, self._config.labels),
        )


def _questions(text: HeldoutText, tokenizer: Any, config: MonosemanticConfig) -> list[Questions]:
    """The concepts of tokens and of documents; kinds without any concept left are not asked."""
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
    return [Questions.of(units, found, config.seed) for units, found in asked if found.names]


def _names(questions: list[Questions]) -> tuple[list[str], list[str]]:
    """Names and families of all concepts."""
    return (
        [name for asked in questions for name in asked.concepts.names],
        [family for asked in questions for family in asked.concepts.families],
    )


def _consistency(
    dictionaries: Mapping[str, Dictionary], found: dict[str, DictionaryScores]
) -> dict[str, dict[str, Any]]:
    """PW-MCC of every group of dictionaries that differ in their seeds only."""
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
        if group in result:  # the same arm of another training
            group = f"{group} ({', '.join(members.values())})"
        names = [members[seed] for seed in sorted(members)]
        decoders = [dictionaries[name].W_dec.detach() for name in names]
        alive = [found[name].per_latent["density"] > 0 for name in names]
        result[group] = {
            "dictionaries": names,
            "pw_mcc": pw_mcc(decoders),
            "pw_mcc_alive": pw_mcc(decoders, alive),
        }
    return result


def _made_alike(dictionary: Dictionary) -> str:
    """What two dictionaries share that differ in their seeds only."""
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
