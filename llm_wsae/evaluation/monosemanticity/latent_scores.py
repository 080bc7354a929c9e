"""The scores of every eligible latent of one dictionary, from where it fires.

A latent is eligible when it fires in enough contexts for all of its top contexts and, in addition,
all of its sampled ones. Means over eligible latents say nothing about the others, so every mean is
reported with their share: a dictionary with few eligible latents may look good because of what is
left out.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_wsae.evaluation.config import MonosemanticConfig
from llm_wsae.evaluation.heldout import HeldoutText
from llm_wsae.evaluation.monosemanticity.detection import Documents, detection
from llm_wsae.evaluation.monosemanticity.firings import (
    NO_ROW,
    Examples,
    FiringCollector,
    Firings,
    quantile_sample,
    silent_windows,
)
from llm_wsae.evaluation.monosemanticity.window_embeddings import WindowEmbeddings
from llm_wsae.statistics.coherence import coherence, coherence_of_strangers

SCORES = (
    "purity",
    "purity_sampled",
    "entropy",
    "entropy_sampled",
    "coherence",
    "coherence_sampled",
    "detection",
    "detection_without_tokens",
)
"""Of a latent's top contexts (``statistics.measures``; ``entropy`` is that of their tokens, in
bits), and ``sampled`` over all quantiles of its activation."""
RESAMPLED = "detection_resampled"
"""Detection of every latent on resamplings of the documents, beside its scores."""
_RESAMPLINGS = 100
_LATENTS_AT_ONCE = 256  # whose embeddings, and pairs of windows, are in memory together


@dataclass(frozen=True)
class LatentScorer:
    """Scores latents on one text, with random windows that all dictionaries share."""

    text: HeldoutText
    token: Int[Tensor, " rows"]
    """A number for each row's token, ignoring space and case."""
    random: Int[Tensor, " windows"]
    """The rows at the centre of the random windows."""
    windows: Int[Tensor, "windows width"]
    """The positions of the random windows."""
    embeddings: WindowEmbeddings
    config: MonosemanticConfig

    @classmethod
    def of(
        cls,
        text: HeldoutText,
        token: Int[Tensor, " rows"],
        embeddings: WindowEmbeddings,
        config: MonosemanticConfig,
    ) -> "LatentScorer":
        """Draw the random windows."""
        generator = torch.Generator().manual_seed(config.seed)
        random = torch.randperm(text.num_rows, generator=generator)[: config.silent].sort().values
        embeddings.prepare(random)
        return cls(text, token, random, embeddings.cells(random), embeddings, config)

    def collector(self, d_sae: int, device: torch.device | str) -> FiringCollector:
        """A collector of the firings that ``scores`` needs."""
        top, sample = self.config.top, self.config.sample
        # More than will be used: some are in top contexts, and the rest is chosen by quantile.
        drawn = top + 4 * sample
        return FiringCollector(self.text, self.windows, d_sae, top, drawn, self.config.seed, device)

    def eligible(self, firings: Firings) -> Bool[Tensor, " d_sae"]:
        """The latents that fire in enough contexts."""
        return firings.contexts >= self.config.top + self.config.sample

    def chance(self) -> dict[str, float]:
        """``purity`` and ``entropy`` of the tokens if latents fired at random: of as many random
        windows as a latent has top contexts."""
        # One from each stretch of the text, as top contexts are different contexts.
        count = len(self.random) // self.config.top
        if not count:
            return {"purity": float("nan"), "entropy": float("nan")}
        rows = self.random[: count * self.config.top].view(self.config.top, count).T
        found = token_purity(rows, self.token)
        return {"purity": float(found.purity.mean()), "entropy": float(found.entropy.mean())}

    def scores(self, firings: Firings) -> dict[str, Float[Tensor, " d_sae"]]:
        """Every score of ``SCORES`` for all latents, and ``RESAMPLED`` [d_sae, resamplings]; NaN
        where a latent has none."""
        latents = self.eligible(firings).nonzero()[:, 0]
        top = firings.top
        sample = quantile_sample(firings, self.text, self.config.sample)
        self.embeddings.prepare(torch.cat([top.rows[latents], sample.rows[latents]], 1))
        random = self.embeddings.of(self.random)
        strangers = coherence_of_strangers(random, self.text.context[self.random])
        nothing = torch.full((len(firings.counts),), torch.nan, dtype=torch.float64)
        found = {name: nothing.clone() for name in SCORES}
        found[RESAMPLED] = nothing[:, None].repeat(1, _RESAMPLINGS)
        genre, drawn = self._documents()
        for some in latents.split(_LATENTS_AT_ONCE):
            part = self._scores_of(
                Examples(*(t[some] for t in top)),
                Examples(*(t[some] for t in sample)),
                silent_windows(firings, self.text, self.windows, some),
                random,
                genre,
                drawn,
            )
            for name, values in part.items():
                found[name][some] = values.double()
        for name in ("coherence", "coherence_sampled"):
            found[name] -= strangers
        return found

    def _scores_of(
        self,
        top: Examples,
        sample: Examples,
        silent: Tensor,
        random: Tensor,
        genre: Tensor,
        drawn: Tensor,
    ) -> dict[str, Tensor]:
        of_top, of_sample = self.embeddings.of(top.rows), self.embeddings.of(sample.rows)
        tokens = (self.token[top.rows], self.token[sample.rows], self.token[self.random])
        of_row = self.text.document_of
        documents = Documents(
            of_row[top.rows], of_row[sample.rows], of_row[self.random], genre, drawn
        )
        detected = detection(of_top, of_sample, random, silent, tokens, documents)
        assert detected.resampled is not None
        purity = token_purity(top.rows, self.token)
        sampled = token_purity(sample.rows, self.token)
        return {
            "purity": purity.purity,
            "purity_sampled": sampled.purity,
            "entropy": purity.entropy,
            "entropy_sampled": sampled.entropy,
            "coherence": coherence(of_top),
            "coherence_sampled": coherence(of_sample),
            "detection": detected.auroc,
            "detection_without_tokens": detected.without_tokens,
            RESAMPLED: detected.resampled,
        }

    def _documents(
        self,
    ) -> tuple[Int[Tensor, " documents"], Float[Tensor, "resamplings documents"]]:
        """The genre of every document, and how often each resampling holds it. Documents of one
        genre have the same labels, whatever their values: so do the parts of a joined corpus. The
        last entry, -1, is of rows in no document: a genre of their own, once in each resampling."""
        count = int(self.text.document_of.max()) + 1
        kinds: dict[tuple[str, ...], int] = {}
        genre = torch.zeros(count + 1, dtype=torch.long)
        genre[-1] = -1
        for number, header in self.text.headers.items():
            if number < count:
                kind = tuple(sorted(header["labels"]))
                genre[number] = kinds.setdefault(kind, len(kinds))
        present = self.text.document_of.unique()
        present = present[present >= 0]
        generator = torch.Generator().manual_seed(self.config.seed)
        chosen = torch.randint(len(present), (_RESAMPLINGS, len(present)), generator=generator)
        drawn = torch.zeros(_RESAMPLINGS, count + 1)
        drawn[:, -1] = 1
        drawn.scatter_add_(1, present[chosen], torch.ones(chosen.shape))
        return genre, drawn


class Purity(NamedTuple):
    """How far the tokens of each latent's examples agree; NaN for a latent without examples."""

    purity: Float[Tensor, " latents"]
    """Share of the most frequent token."""
    entropy: Float[Tensor, " latents"]
    """Entropy of the tokens' frequencies, in bits; at most log2 of the number of examples."""


def token_purity(rows: Int[Tensor, "latents examples"], token: Int[Tensor, " rows"]) -> Purity:
    """Purity of the ``token`` at each latent's rows; a row of -1 is no example."""
    there = rows != NO_ROW
    found = token[rows.clamp(min=0)]
    same = (found[:, :, None] == found[:, None, :]) & there[:, None, :]  # [latents, each, others]
    alike = same.sum(2).double()
    number = there.sum(1).double()
    share = alike / number[:, None]
    # A token of frequency f appears in f·number examples, so this mean is Σ f log2(1/f).
    surprise = torch.where(there, -share.log2(), 0.0).sum(1) / number
    purity = torch.where(there, share, 0.0).amax(1)
    return Purity(purity.where(number > 0, torch.nan), surprise)
