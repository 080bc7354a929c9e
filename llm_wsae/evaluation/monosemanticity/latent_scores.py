"""The scores of every eligible latent of one dictionary, from where it fires.

A latent is eligible when it fires in enough contexts for all of its top ones and, apart from them,
all of its sampled ones. Means over eligible latents say nothing about the others, so their share
stands beside every mean: a dictionary with few eligible latents may look good by what is left out.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_wsae.evaluation.heldout import HeldoutText
from llm_wsae.evaluation.monosemanticity.config import MonosemanticConfig
from llm_wsae.evaluation.monosemanticity.detection import detection
from llm_wsae.evaluation.monosemanticity.purity import token_purity
from llm_wsae.evaluation.monosemanticity.top_contexts import (
    Collector,
    Examples,
    Firings,
    quantile_sample,
    silent_windows,
)
from llm_wsae.evaluation.monosemanticity.windows import WindowEmbeddings
from llm_wsae.statistics.coherence import coherence, coherence_of_strangers

SCORES = {
    "purity": "share of the most frequent token among a latent's top contexts",
    "purity_sampled": "the same among contexts sampled over all quantiles of its activation",
    "entropy": "entropy of the tokens of the top contexts, in bits",
    "entropy_sampled": "the same of the sampled contexts",
    "coherence": "mean cosine of the meanings of its top contexts, less that of random ones",
    "coherence_sampled": "the same of the sampled contexts",
    "detection": "chance that a sampled context is nearer to the centroid of the top ones than a "
    "silent context is (0.5: nothing in common)",
    "detection_without_tokens": "the same without contexts whose token is one of the top ones'",
}
_LATENTS_AT_ONCE = 512  # their embeddings are in memory together


@dataclass(frozen=True)
class Judge:
    """What all dictionaries are judged with: the text, its random windows, and their meanings."""

    text: HeldoutText
    token: Int[Tensor, " rows"]
    """A number for each row's token, space and case aside."""
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
    ) -> "Judge":
        """Draw the random windows."""
        generator = torch.Generator().manual_seed(config.seed)
        random = torch.randperm(text.num_rows, generator=generator)[: config.silent].sort().values
        embeddings.prepare(random)
        return cls(text, token, random, embeddings.cells(random), embeddings, config)

    def collector(self, d_sae: int, device: torch.device | str) -> Collector:
        """What collects the firings that ``scores`` asks for."""
        top, sample = self.config.top, self.config.sample
        # More than will be used: some lie in top contexts, the rest is chosen by quantile.
        drawn = top + 4 * sample
        return Collector(self.text, self.windows, d_sae, top, drawn, self.config.seed, device)

    def eligible(self, firings: Firings) -> Bool[Tensor, " d_sae"]:
        """The latents that fire in enough contexts."""
        return firings.contexts >= self.config.top + self.config.sample

    def chance(self) -> dict[str, float]:
        """``purity`` and ``entropy`` of tokens as if latents fired at random: those of as many
        random windows as a latent has top contexts."""
        # One of each stretch of the text, as top contexts are of different contexts.
        count = len(self.random) // self.config.top
        if not count:
            return {"purity": float("nan"), "entropy": float("nan")}
        rows = self.random[: count * self.config.top].view(self.config.top, count).T
        found = token_purity(rows, self.token)
        return {"purity": float(found.purity.mean()), "entropy": float(found.entropy.mean())}

    def scores(self, firings: Firings) -> dict[str, Float[Tensor, " d_sae"]]:
        """Every score of ``SCORES`` for all latents; NaN where a latent has none."""
        latents = self.eligible(firings).nonzero()[:, 0]
        top = firings.top
        sample = quantile_sample(firings, self.text, self.config.sample)
        silent = silent_windows(firings, self.text, self.windows)
        self.embeddings.prepare(torch.cat([top.rows[latents], sample.rows[latents]], 1))
        random = self.embeddings.of(self.random)
        strangers = coherence_of_strangers(random, self.text.context[self.random])
        nothing = torch.full((len(firings.counts),), torch.nan, dtype=torch.float64)
        found = {name: nothing.clone() for name in SCORES}
        for some in latents.split(_LATENTS_AT_ONCE):
            part = self._scores_of(
                Examples(*(t[some] for t in top)),
                Examples(*(t[some] for t in sample)),
                silent[some],
                random,
            )
            for name, values in part.items():
                found[name][some] = values.double()
        for name in ("coherence", "coherence_sampled"):
            found[name] -= strangers
        return found

    def _scores_of(
        self, top: Examples, sample: Examples, silent: Tensor, random: Tensor
    ) -> dict[str, Tensor]:
        of_top, of_sample = self.embeddings.of(top.rows), self.embeddings.of(sample.rows)
        tokens = (self.token[top.rows], self.token[sample.rows], self.token[self.random])
        detected = detection(of_top, of_sample, random, silent, tokens)
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
        }
