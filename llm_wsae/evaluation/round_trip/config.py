"""Settings of the recovery report. Free of torch, for the command line."""

from dataclasses import dataclass

from llm_wsae.outside import check_numbers

MOST_INJECTIONS = 4096  # rows, among which latents are selected anew for every latent


@dataclass(frozen=True)
class RecoverConfig:
    """Settings of ``recover``."""

    rows: int = 50_000
    """Rows of the store that are read, its last ones; massive rows are ignored."""
    injections: int = 64
    """Rows, evenly spread over those read, into which every latent is injected where it is silent,
    each time with another of its own strengths."""
    seed: int = 0
    """Seed of the thinned codes and of the frozen random dictionary."""

    def __post_init__(self) -> None:
        check_numbers(self, rows=1, injections=(1, MOST_INJECTIONS))
