"""Are the latents of dictionaries monosemantic? Measured on held-out text, without an LLM judge.

Two kinds of evidence, which can disagree and are therefore reported together: latents one by one
(``latents``: do the tokens and texts on which a latent fires have something in common?) and
concepts with known truth (``probing``: does a latent stand for a concept, and for nothing else?).
The forward pass, the embeddings of windows and the probes of the activations are shared by all
dictionaries, together or one after the other.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

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
from llm_wsae.evaluation.monosemanticity.report import (
    DictionaryScores,
    MonosemanticReport,
    latent_means,
    summarise,
)
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.sentence_encoder import SentenceEncoder
from llm_wsae.model.site import Site
from llm_wsae.statistics.uncertainty import TextSize


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
        """Contexts are packed as ``packing`` says; ``encoder`` replaces ``config.encoder``.

        Raises UsageError if the encoder is not available or a label is unknown; LlmWsaeError if the
        text is too short.
        """
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
            by_site[one.site].append(one)
        thresholds = {
            site: self._activations.massive_threshold(site, own)
            for site, own in sorted(by_site.items(), key=lambda item: item[0])
        }
        new = {site: at for site, at in thresholds.items() if (site, at) not in self._probes}
        for site, x in read_units(self._activations, new, self._kinds).items() if new else ():
            self._probes[site, new[site]] = probe_site(self._concepts, x, self._config.seed)
        probes = {site: self._probes[site, at] for site, at in thresholds.items()}
        recorders = {
            name: self._scorer.recorder(
                on_device_of(self._model, one), thresholds[one.site], self._kinds
            )
            for name, one in dictionaries.items()
        }
        for batch in self._activations.rows(list(thresholds)):
            for recorder in recorders.values():
                recorder.add(batch)
        scores = {
            name: self._scores(name, recorder.finished(), probes[recorder.dictionary.site])
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
            sites={str(site): self._of_site(found) for site, found in probes.items()},
            dictionaries=scores,
            notes=[*notes_on_weights(dictionaries, self._model), *notes, *size.warnings()],
        )

    def _of_site(self, probes: SiteProbes) -> dict[str, Any]:
        found = summarise(self._names, self._families, probes.columns)
        return vars(found) | {"means": {key: one.mean for key, one in found.means.items()}}
