"""Are the latents of dictionaries monosemantic? Measured on held-out text, without an LLM judge.

Three kinds of evidence, which can disagree and are therefore reported together:

- latents one by one (``latents``): do the tokens and texts on which a latent fires have
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
from llm_wsae.evaluation.monosemanticity.probing import (
    Columns,
    SiteProbes,
    probe_latents,
    probe_site,
)
from llm_wsae.evaluation.monosemanticity.report import (
    ConceptSummary,
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
        found = concepts_of(text, model.tokenizer, config)
        self._kinds, self._concepts = [u for u, _ in found], [own for _, own in found]
        self._probes: dict[tuple[Site, float], SiteProbes] = {}

    def score(self, dictionaries: Mapping[str, Dictionary]) -> MonosemanticReport:
        """Score dictionaries, by name, of any sites, in one pass over the text.

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
        recorders = {
            name: self._scorer.recorder(
                on_device_of(self._model, one), thresholds[one.site], self._kinds
            )
            for name, one in dictionaries.items()
        }
        for batch in self._activations.rows(sorted(by_site)):
            for recorder in recorders.values():
                recorder.add(batch)
        scores = {
            name: self._scores(name, recorder.finished(), probes[recorder.dictionary.site])
            for name, recorder in recorders.items()
        }
        return self._report(dictionaries, scores, probes)

    def _site_probes(self, thresholds: Mapping[Site, float]) -> dict[Site, SiteProbes]:
        """Probes of the activations at every site, each trained once."""
        new = {s: at for s, at in sorted(thresholds.items()) if (s, at) not in self._probes}
        for site, x in read_units(self._activations, new, self._kinds).items() if new else ():
            self._probes[site, new[site]] = probe_site(self._concepts, x, self._config.seed)
        return {site: self._probes[site, at] for site, at in thresholds.items()}

    def _scores(self, name: str, firings: Firings, site_probes: SiteProbes) -> DictionaryScores:
        dictionary, density = firings.dictionary, firings.density
        dense, eligible = density > DENSE_DENSITY, self._scorer.eligible(firings)
        scores = self._scorer.scores(firings)
        resampled = scores.pop(RESAMPLED)
        allowed = [torch.ones_like(dense), *([~dense] if bool(dense.any()) else [])]
        decoder = dictionary.W_dec.detach().cpu()
        probed = probe_latents(site_probes, firings.tables(), decoder, allowed)
        concepts = [self._summary(columns) for columns in probed]
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

    def _summary(self, columns: Columns) -> ConceptSummary:
        names = [name for one in self._concepts for name in one.names]
        families = [family for one in self._concepts for family in one.families]
        return summarise(names, families, columns)

    def _report(
        self,
        dictionaries: Mapping[str, Dictionary],
        scores: dict[str, DictionaryScores],
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
            chance={"purity": self._scorer.chance()},
            sites={str(site): self._of_site(found) for site, found in probes.items()},
            dictionaries=scores,
            consistency=consistency(dictionaries, alive),
            notes=[*notes_on_weights(dictionaries, self._model), *self._notes(), *size.warnings()],
        )

    def _of_site(self, probes: SiteProbes) -> dict[str, Any]:
        """What ``MonosemanticReport.sites`` holds for a site."""
        found = self._summary(probes.columns)
        return vars(found) | {"means": {key: one.mean for key, one in found.means.items()}}

    def _notes(self) -> list[str]:
        families = {family for one in self._concepts for family in one.families}
        notes = [] if families else ["the text holds too few examples of any concept"]
        return notes + [
            f"the text holds too few documents of any value of the label {label}"
            for label in dict.fromkeys(self._config.labels)
            if label not in families
        ]


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
    result: dict[str, dict[str, Any]] = {}
    for (group, _), members in groups.items():
        if len(members) < 2:
            continue
        if group in result:  # the same arm in another training
            group = f"{group} ({', '.join(members.values())})"
        names = [members[seed] for seed in sorted(members)]
        decoders = [dictionaries[name].W_dec.detach() for name in names]
        living = [one[alive[name]] for name, one in zip(names, decoders, strict=True)]
        found = {"pw_mcc": pw_mcc(decoders), "pw_mcc_alive": pw_mcc(living)}
        result[group] = {"dictionaries": names, **found}
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
