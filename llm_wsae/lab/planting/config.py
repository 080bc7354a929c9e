"""Which features are planted. Free of torch, for the command line."""

from dataclasses import dataclass

from llm_wsae.errors import UsageError
from llm_wsae.outside import check_numbers

MOST_PER_CELL = 10_000
LEAST_STRENGTH = 1e-6
"""A weaker plant is lost in the rounding of float32."""
LEAST_PROBABILITY = 1e-6
"""A rarer plant is on hardly any row that is held out, and float32 cannot draw it exactly."""


@dataclass(frozen=True)
class PlantConfig:
    """Features to plant: the same number in every stratum of directions at every strength."""

    seed: int = 0
    """Seed of the directions, of how often features fire, and of when."""
    per_cell: int = 16
    """Features of each stratum at each strength."""
    strengths: tuple[float, ...] = (0.12, 0.2, 0.35)
    """Mean strengths, in median norms of the centred rows."""
    rarest: float = 3e-4
    """Smallest probability that a feature fires on a row; probabilities are log-uniform."""
    commonest: float = 1e-2
    """Largest probability that a feature fires on a row."""
    token_share: float = 0.25
    """Share of the features that fire on one token only, on half of its occurrences at random."""
    dictionary: str | None = None
    """Folder of a dictionary of the site, better of another seed than those that are compared:
    some of its decoder rows are planted too."""
    natural: bool = False
    """Also plant along the stream's own directions: Σ^¼g, Σ^½g, and means of tokens."""
    heldout_share: float = 0.15
    """Share of the store's rows, its last ones, that are not trained on: recovery is measured
    there. At least 2,048 rows are held out."""

    def __post_init__(self) -> None:
        check_numbers(self, per_cell=(1, MOST_PER_CELL))
        if not self.strengths:
            raise UsageError("give at least one of strengths")
        if not all(LEAST_STRENGTH <= strength <= 1 for strength in self.strengths):
            raise UsageError(
                f"a plant's strength must be at least {LEAST_STRENGTH:g}, or it is lost in "
                "rounding, and at most 1, the median norm of the rows, or it would drown the "
                f"stream; not {', '.join(map(str, self.strengths))}"
            )
        if not LEAST_PROBABILITY <= self.rarest <= self.commonest < 1:
            raise UsageError(
                f"plants fire with probabilities from {self.rarest:g} to {self.commonest:g}; these "
                f"must rise, be at least {LEAST_PROBABILITY:g} and less than 1"
            )
        if not 0 <= self.token_share <= 1 or not 0 < self.heldout_share < 1:
            raise UsageError("token-share must be from 0 to 1, heldout-share between 0 and 1")
