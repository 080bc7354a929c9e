"""Settings of the fidelity measurements. Free of torch: the command line imports them."""

from dataclasses import dataclass

from llm_wsae.errors import UsageError


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of ``evaluate``."""

    tokens: int = 50_000
    """Rows (kept positions) of held-out text to evaluate on.
    Below 50,000 the noise of CE recovered is as large as the differences between good
    dictionaries."""
    batch_tokens: int = 1024
    """Tokens in one forward pass (at least one context).
    Up to three copies of their logits over the vocabulary are in memory."""
    bootstraps: int = 1000
    """Resamplings of the contexts behind each 95 % interval."""
    seed: int = 0
    """Seed of the resamplings."""

    def __post_init__(self):
        for name, least in (("tokens", 1), ("batch_tokens", 1), ("bootstraps", 1), ("seed", 0)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise UsageError(f"{flag} is {getattr(self, name)}, but must be at least {least}")
