"""Are the latents of dictionaries monosemantic? Measured on held-out text, without an LLM judge.

Three kinds of evidence, which can disagree and are therefore reported together:

- latents one by one (``latent_scores``): do the tokens and texts on which a latent fires have
  something in common?
- concepts with known truth (``probing``): does a latent stand for a concept, and for nothing
  else?
- other seeds (``pw_mcc``): are the same latents found again?

A ``MonosemanticityEvaluator`` reads the text once: the forward pass, the embeddings of windows and
the probes of the activations are shared by all dictionaries, together or one after the other.
"""

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
from llm_wsae.evaluation.activations import ActivationCache, on_device_of
from llm_wsae.evaluation.checks import check_fit, notes_on_weights
from llm_wsae.evaluation.config import MonosemanticConfig
from llm_wsae.evaluation.heldout import Encoder, HeldoutText, WindowEmbeddings
from llm_wsae.evaluation.monosemanticity.concepts import (
    NO_UNIT,
    Units,
    document_concepts,
    folded_tokens,
    halves_of_documents,
    token_concepts,
    units_of_documents,
    units_of_tokens,
)
from llm_wsae.evaluation.monosemanticity.firings import Recorder, read_units, record
from llm_wsae.evaluation.monosemanticity.latent_scores import RESAMPLED, LatentScorer
from llm_wsae.evaluation.monosemanticity.probing import (
    ProbedConcepts,
    SiteProbes,
    probe_latents,
    probe_site,
)
from llm_wsae.evaluation.monosemanticity.report import (
    DictionaryScores,
    MonosemanticReport,
    latent_means,
    summarise,
)
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.sentence_encoder import SentenceEncoder
from llm_wsae.model.site import Site
from llm_wsae.statistics.documents import TextSize

MOST_PAIRS = 2**27  # a gigabyte of cosines; with more, the matching takes hours too


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
        self._concepts = _concepts(text, model.tokenizer, config)
        self._kinds = [asked.units for asked in self._concepts]
        self._names = [name for asked in self._concepts for name in asked.concepts.names]
        self._families = [family for asked in self._concepts for family in asked.concepts.families]
        self._probes: dict[tuple[Site, float], SiteProbes] = {}

    def score(self, dictionaries: Mapping[str, Dictionary]) -> MonosemanticReport:
        """Score dictionaries, by name, of any sites.

        Raises UsageError if there is none or one does not fit the model.
        """
        check_fit(dictionaries, self._model, "score")
        by_site: dict[Site, list[Dictionary]] = defaultdict(list)
        for dictionary in dictionaries.values():
            by_site[dictionary.site].append(dictionary)
        thresholds = {
            site: self._activations.massive_threshold(site, own) for site, own in by_site.items()
        }
        probes = self._site_probes(thresholds)
        groups = [dict(dictionaries)]  # in one pass, or if that costs no more, one by one
        if self._activations.holds(by_site):
            groups = [{name: one} for name, one in dictionaries.items()]
        scores: dict[str, DictionaryScores] = {}
        for group in groups:
            recorders = {
                name: self._scorer.recorder(
                    on_device_of(self._model, one), thresholds[one.site], self._kinds
                )
                for name, one in group.items()
            }
            record(self._activations, list(recorders.values()))
            for name, recorder in recorders.items():
                scores[name] = self._scores(name, recorder, probes[recorder.dictionary.site])
        return self._report(dictionaries, scores, probes)

    def _site_probes(self, thresholds: Mapping[Site, float]) -> dict[Site, SiteProbes]:
        """Probes of the activations at every site, each trained once."""
        new = {s: at for s, at in sorted(thresholds.items()) if (s, at) not in self._probes}
        for site, x in read_units(self._activations, new, self._kinds).items() if new else ():
            self._probes[site, new[site]] = probe_site(self._concepts, x)
        return {site: self._probes[site, at] for site, at in thresholds.items()}

    def _scores(self, name: str, recorder: Recorder, site_probes: SiteProbes) -> DictionaryScores:
        dictionary, firings = recorder.dictionary, recorder.firings()
        density = firings.density
        dense = density > DENSE_DENSITY
        eligible = self._scorer.eligible(firings)
        scores = self._scorer.scores(firings)
        resampled = scores.pop(RESAMPLED)
        allowed = [torch.ones_like(dense), *([~dense] if bool(dense.any()) else [])]
        decoder = dictionary.W_dec.detach().cpu()
        probed = probe_latents(site_probes, recorder.tables(), decoder, density, allowed)
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
            latents_not_dense=latent_means(scores, eligible & ~dense, resampled, *draws),
            concepts=concepts[0],
            concepts_not_dense=concepts[-1],
            per_latent={**scores, "density": density},
            resampled=resampled,
        )

    def _report(
        self,
        dictionaries: Mapping[str, Dictionary],
        scores: Mapping[str, DictionaryScores],
        probes: Mapping[Site, SiteProbes],
    ) -> MonosemanticReport:
        text = self._scorer.text
        size = TextSize.of(text.document_of.numpy())
        alive = {name: one.per_latent["density"] > 0 for name, one in scores.items()}
        return MonosemanticReport(
            model=self._model.identity(),
            corpus=self._corpus,
            config=asdict(self._config),
            num_contexts=text.num_contexts,
            num_rows=text.num_rows,
            num_documents=size.documents,
            effective_documents=size.effective,
            chance=self._scorer.chance(),
            sites={str(site): self._of_site(found) for site, found in probes.items()},
            dictionaries={name: scores[name] for name in dictionaries},
            consistency=consistency(dictionaries, alive),
            notes=[*notes_on_weights(dictionaries, self._model), *self._notes(), *size.warnings()],
        )

    def _of_site(self, probes: SiteProbes) -> dict[str, Any]:
        """What ``MonosemanticReport.sites`` holds for a site."""
        found = summarise(self._names, self._families, probes.columns)
        return vars(found) | {"means": {key: one.mean for key, one in found.means.items()}}

    def _notes(self) -> list[str]:
        notes = [] if self._names else ["the text holds too few examples of any concept"]
        return notes + [
            f"the text holds too few documents of any value of the label {label}"
            for label in dict.fromkeys(self._config.labels)
            if label not in self._families
        ]


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
    labels = text.headers, contexts.document, half(contexts), config.labels
    asked = [
        (tokens, token_concepts(text, tokenizer, rows, half(tokens))),
        (contexts, document_concepts(*labels)),
    ]
    return [ProbedConcepts.of(units, found, config.seed) for units, found in asked if found.names]


def consistency(
    dictionaries: Mapping[str, Dictionary], alive: Mapping[str, Bool[Tensor, " d_sae"]]
) -> dict[str, dict[str, Any]]:
    """PW-MCC of every group of dictionaries that differ only in their seeds: ``dictionaries``,
    ``pw_mcc``, and ``pw_mcc_alive`` over the ``alive`` latents."""
    groups: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for name, dictionary in dictionaries.items():
        info = dictionary.info
        if info.seed is None:
            continue
        other = ("seed", "command", "versions")
        training = {key: value for key, value in info.training.items() if key not in other}
        alike = json.dumps([dictionary.d_sae, info.store, training], sort_keys=True, default=str)
        arm = info.name.removesuffix(f"-s{info.seed}")
        groups[f"{info.site} {arm}", alike].setdefault(info.seed, name)
    result = {}
    for (group, _), members in groups.items():
        if len(members) < 2:
            continue
        if group in result:  # the same arm in another training
            group = f"{group} ({', '.join(members.values())})"
        names = [members[seed] for seed in sorted(members)]
        decoders = {name: dictionaries[name].W_dec.detach() for name in names}
        result[group] = {
            "dictionaries": names,
            "pw_mcc": pw_mcc(list(decoders.values())),
            "pw_mcc_alive": pw_mcc([own[alive[name]] for name, own in decoders.items()]),
        }
    return result


def pw_mcc(decoders: Sequence[Float[Tensor, "_ d_in"]]) -> float:
    """Mean over all pairs of decoders of ``matched_cosine``: the pairwise mean correlation
    coefficient of Song et al. 2025 (arXiv 2505.20254). 1 for the same latents in any order; NaN for
    fewer than two decoders."""
    found = [matched_cosine(one, other) for one, other in combinations(decoders, 2)]
    return sum(found) / len(found) if found else float("nan")


def matched_cosine(
    one: Float[Tensor, "d_one d_in"],
    other: Float[Tensor, "d_other d_in"],
    most_pairs: int = MOST_PAIRS,
) -> float:
    """Mean cosine of the rows, matched one to one so that their sum is largest (the Hungarian
    method); unmatched rows do not count. NaN without rows.

    For more than 2²⁷ pairs (11,585 rows each), only that many pairs are used, with rows of ``one``
    drawn at random: the mean is then slightly too high, because fewer rows compete.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    most = max(1, most_pairs // max(1, len(other)))
    if len(one) > most:
        drawn = torch.randperm(len(one), generator=torch.Generator().manual_seed(0))[:most]
        one = one[drawn.to(one.device)]
    cosines = (normalize(one, dim=1) @ normalize(other, dim=1).T).cpu().double().numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return float(cosines[rows, columns].mean()) if len(rows) else float("nan")
