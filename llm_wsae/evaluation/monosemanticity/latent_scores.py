"""The scores of every eligible latent of one dictionary, from where it fires.

A latent is eligible when it fires in enough contexts for all of its top contexts and, in addition,
all of its sampled ones. Means over eligible latents say nothing about the others, so every mean is
reported with their share: a dictionary with few eligible latents may look good because of what is
left out.
"""

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

RESAMPLED = "detection_resampled"
"""Detection of every latent on resamplings of the documents, beside its scores."""
_RESAMPLINGS = 100
_LATENTS_AT_ONCE = 256  # whose embeddings, and pairs of windows, are in memory together


class LatentScorer:
    """Scores latents on one text, with random windows that all dictionaries share."""

    def __init__(
        self,
        text: HeldoutText,
        token: Int[Tensor, " rows"],
        embeddings: WindowEmbeddings,
        config: MonosemanticConfig,
    ):
        """``token`` is a number for each row's token, ignoring space and case."""
        generator = torch.Generator().manual_seed(config.seed)
        random = torch.randperm(text.num_rows, generator=generator)[: config.silent].sort().values
        embeddings.prepare(random)
        self.text, self.random, self.windows = text, random, embeddings.cells(random)
        self._token, self._embeddings, self._config = token, embeddings, config
        self._of_random = embeddings.of(random)
        self._strangers = coherence_of_strangers(self._of_random, text.context[random])
        self._genre, self._drawn = _documents(text, config.seed)

    def collector(self, d_sae: int, device: torch.device | str) -> FiringCollector:
        """A collector of the firings that ``scores`` needs."""
        top, sample = self._config.top, self._config.sample
        # More than will be used: some are in top contexts, and the rest is chosen by quantile.
        drawn, seed = top + 4 * sample, self._config.seed
        return FiringCollector(self.text, self.windows, d_sae, top, drawn, seed, device)

    def eligible(self, firings: Firings) -> Bool[Tensor, " d_sae"]:
        """The latents that fire in enough contexts."""
        return firings.contexts >= self._config.top + self._config.sample

    def chance(self) -> dict[str, float]:
        """``purity`` and ``entropy`` of the tokens if latents fired at random: of as many random
        windows as a latent has top contexts; NaN if there are fewer windows."""
        # One from each stretch of the text, as top contexts are different contexts.
        top = self._config.top
        count = len(self.random) // top
        rows = self.random[: count * top].view(top, count).T
        found = token_purity(rows, self._token)
        return {name: float(values.mean()) for name, values in found.items()}

    def scores(self, firings: Firings) -> dict[str, Float[Tensor, " d_sae"]]:
        """Every score of all latents, NaN where a latent has none, and ``RESAMPLED`` [d_sae,
        resamplings].

        The scores (``statistics.measures``; ``entropy`` is that of the tokens, in bits) are of a
        latent's top contexts, and ``_sampled`` of those sampled over the quantiles of its
        activation.
        """
        latents = self.eligible(firings).nonzero()[:, 0]
        sample = quantile_sample(firings, self.text, self._config.sample)
        rows = [firings.top.rows, sample.rows]
        self._embeddings.prepare(torch.cat([one[latents] for one in rows], 1))
        found: dict[str, Tensor] = {}
        for some in latents.split(_LATENTS_AT_ONCE):
            for name, values in self._scores_of(firings, sample, some).items():
                shape = (len(firings.counts), *values.shape[1:])
                nothing = torch.full(shape, torch.nan, dtype=torch.float64)
                found.setdefault(name, nothing)[some] = values.double()
        for name in ("coherence", "coherence_sampled"):
            found[name] -= self._strangers
        return found

    def _scores_of(self, firings: Firings, sample: Examples, some: Tensor) -> dict[str, Tensor]:
        scores: dict[str, Tensor] = {}
        top, sampled = firings.top.rows[some], sample.rows[some]
        for suffix, rows in (("", top), ("_sampled", sampled)):
            found = token_purity(rows, self._token)
            scores |= {f"{name}{suffix}": values for name, values in found.items()}
            scores[f"coherence{suffix}"] = coherence(self._embeddings.of(rows))
        of = self.text.document_of
        detected = detection(
            self._embeddings.of(top),
            self._embeddings.of(sampled),
            self._of_random,
            silent_windows(firings, self.text, self.windows, some),
            (self._token[top], self._token[sampled], self._token[self.random]),
            Documents(of[top], of[sampled], of[self.random], self._genre, self._drawn),
        )
        assert detected.resampled is not None
        return scores | {
            "detection": detected.auroc,
            "detection_without_tokens": detected.without_tokens,
            RESAMPLED: detected.resampled,
        }


def _documents(
    text: HeldoutText, seed: int
) -> tuple[Int[Tensor, " documents"], Float[Tensor, "resamplings documents"]]:
    """The genre of every document, and how often each resampling holds it. Documents of one
    genre have the same labels, whatever their values: so do the parts of a joined corpus. The
    last entry, -1, is of rows in no document: a genre of their own, once in each resampling."""
    count = int(text.document_of.max()) + 1
    kinds: dict[tuple[str, ...], int] = {}
    genre = torch.zeros(count + 1, dtype=torch.long)
    genre[-1] = -1
    for number, header in text.headers.items():
        if number < count:
            genre[number] = kinds.setdefault(tuple(sorted(header["labels"])), len(kinds))
    present = text.document_of.unique()
    present = present[present >= 0]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(present), (_RESAMPLINGS, len(present)), generator=generator)
    drawn = torch.zeros(_RESAMPLINGS, count + 1)
    drawn[:, -1] = 1
    drawn.scatter_add_(1, present[chosen], torch.ones(chosen.shape))
    return genre, drawn


def token_purity(
    rows: Int[Tensor, "latents examples"], token: Int[Tensor, " rows"]
) -> dict[str, Float[Tensor, " latents"]]:
    """How far the ``token`` agrees at each latent's rows: ``purity``, the share of the most
    frequent one, and ``entropy`` of their frequencies, in bits. A row of -1 is no example; NaN for
    a latent without examples."""
    there = rows != NO_ROW
    found = token[rows.clamp(min=0)]
    same = (found[:, :, None] == found[:, None, :]) & there[:, None, :]  # [latents, each, others]
    alike = same.sum(2).double()
    number = there.sum(1).double()
    share = alike / number[:, None]
    # A token of frequency f appears in f·number examples, so this mean is Σ f log2(1/f).
    surprise = torch.where(there, -share.log2(), 0.0).sum(1) / number
    purity = torch.where(there, share, 0.0).amax(1)
    return {"purity": purity.where(number > 0, torch.nan), "entropy": surprise}
