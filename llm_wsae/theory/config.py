"""The planted experiments and their settings, free of torch: the command line imports them."""

from dataclasses import dataclass

from llm_wsae.errors import UsageError, nearest
from llm_wsae.outside import check_numbers


@dataclass(frozen=True)
class Experiment:
    """Planted data of one kind, at one sparsity, and the learning rate of its dictionaries."""

    regime: str
    """Name of the mixture (``superposition.REGIMES``)."""
    sparsity: float
    """Probability S that a feature is 0."""
    learning_rate: float
    """Peak learning rate of Adam. Where it is low, the plain dictionary is unfinished when training
    ends, and anything that speeds it up looks like a better weight; so the mixtures run at
    several."""
    why: str
    """What the experiment shows."""


# The middle rate is the default. 0.001 is Adam's usual rate and leaves dictionaries unfinished;
# 0.04 gives the best plain dictionaries at S = 0.5.
_STANDARD: dict[str, Experiment] = {
    "digon-0.5": Experiment("digon", 0.5, 0.01, "the closed form's own position, dense"),
    "digon-0.7": Experiment("digon", 0.7, 0.01, "the same, sparser"),
    "mixed-0.5": Experiment("mixed", 0.5, 0.01, "dense mixture: local optima"),
    "mixed-0.5-slow": Experiment("mixed", 0.5, 0.001, "the same, unfinished"),
    "mixed-0.5-fast": Experiment("mixed", 0.5, 0.04, "the same, best rate of the plain arm"),
    "mixed-0.7": Experiment("mixed", 0.7, 0.01, "sparser mixture"),
    "mixed-0.7-slow": Experiment("mixed", 0.7, 0.001, "the same, unfinished"),
    "mixed-0.9": Experiment("mixed", 0.9, 0.01, "near the limit of exact recovery"),
    "rotated-0.5": Experiment("rotated", 0.5, 0.01, "no dimension is monosemantic"),
    "frequent-0.7": Experiment("frequent", 0.7, 0.01, "lone features 3× as frequent"),
    "strong-0.7": Experiment("strong", 0.7, 0.01, "lone features 2× as strong"),
    "outliers-0.7": Experiment("outliers", 0.7, 0.01, "three dimensions 20× as large"),
    "toy-40-0.9": Experiment("toy-40", 0.9, 0.01, "trained superposition, 40 in 20"),
    "toy-200-0.95": Experiment("toy-200", 0.95, 0.01, "trained superposition, 200 in 20"),
}
_RELATED: dict[str, Experiment] = {
    "hierarchy-0.9": Experiment("hierarchy", 0.9, 0.01, "8 parents, 2 children each"),
    "hierarchy-off-0.9": Experiment("hierarchy-off", 0.9, 0.01, "the same rates, independent"),
    "correlated-0.9": Experiment("correlated", 0.9, 0.01, "groups of 4, copula ρ = 0.8"),
    "correlated-off-0.9": Experiment("correlated-off", 0.9, 0.01, "the same groups, independent"),
}
EXPERIMENTS: dict[str, Experiment] = _STANDARD | _RELATED
"""Those that run by default, then related features, each with a twin of independent ones."""


@dataclass(frozen=True)
class TheoryConfig:
    """Settings of the planted experiments."""

    experiments: tuple[str, ...] = tuple(_STANDARD)
    """Names of the experiments."""
    seeds: tuple[int, ...] = tuple(range(10))
    """Seeds of each experiment: of the data, initial weights and rows, which all arms share.
    Five seeds have been seen to mislead."""
    steps: int = 2000
    """Steps of each dictionary."""
    batch_size: int = 256
    """Rows per step."""
    spare_latents: int = 10
    """Latents of a dictionary beyond the number of true features."""
    rows: int = 8192
    """Rows that rules are computed from, and fresh rows that dictionaries are measured on."""
    workers: int = 0
    """Experiments computed in parallel, each on one core; 0 takes every core."""

    def __post_init__(self) -> None:
        for name in self.experiments:
            if name not in EXPERIMENTS:
                raise UsageError(
                    f"there is no planted experiment {name!r}; {nearest(name, EXPERIMENTS)}"
                )
        if len(set(self.experiments)) != len(self.experiments):
            raise UsageError("a planted experiment is listed twice; name each one once")
        if not self.experiments:
            raise UsageError(f"name at least one planted experiment of {', '.join(EXPERIMENTS)}")
        check_numbers(
            self,
            steps=1,
            batch_size=(1, 10**5),
            rows=(100, 10**6),
            spare_latents=(0, 10**5),
            workers=(0, 10**4),
        )
        if len(set(self.seeds)) < max(2, len(self.seeds)):
            given = " ".join(map(str, self.seeds))
            raise UsageError(
                f"seeds are {given or 'none'}; an interval needs at least two different ones"
            )
