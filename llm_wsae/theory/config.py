"""The planted experiments and their settings, free of torch: the command line imports them."""

from dataclasses import dataclass, replace

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
class Point:
    """One setting of a sweep."""

    regime: str
    """Name of the mixture (``superposition.REGIMES``)."""
    sparsity: float
    """Probability S that a feature is 0."""
    latents: int
    k: int
    """Latents kept in a row; 0: all positive ones, a ReLU."""

    @property
    def activation(self) -> str:
        """``ReLU`` or ``TopK 5``."""
        return f"TopK {self.k}" if self.k else "ReLU"

    @property
    def kept(self) -> int:
        """Most latents of a row."""
        return self.k or self.latents


@dataclass(frozen=True)
class Sweep:
    """Dictionaries of few arms at many settings."""

    why: str
    """What it shows."""
    points: dict[str, Point]
    """By label."""
    arms: tuple[str, ...]
    """Names of the arms (``rules.ARMS``), plain first."""

    @property
    def lines(self) -> dict[str, list[str]]:
        """Labels of the points, by activation if the sweep has every sparsity with both kinds."""
        limited = [label for label, point in self.points.items() if point.k]
        rest = [label for label, point in self.points.items() if not point.k]
        if len(limited) == len(rest):
            return {"ReLU": rest, "TopK": limited}
        return {"": list(self.points)}


PAPERS_SIZES = (200, 20, 200)
"""n, n_p and n_m of the toy experiment of Cui et al. 2026."""
SWEPT = (0.5, 0.7, 0.9, 0.95, 0.99, 0.999)
"""Sparsities S of the toy experiment."""
_MOST_ACTIVE = 10  # half of n_p: beyond that TopK limits little


def _by_sparsity(regime: str) -> dict[str, Point]:
    """ReLU and TopK at every sparsity; k is half the mean number of active features, in limits."""
    n, _, latents = PAPERS_SIZES
    points = {}
    for sparsity in SWEPT:
        k = min(_MOST_ACTIVE, max(1, round(n * (1 - sparsity) / 2)))
        for kept in (0, k):
            point = Point(regime, sparsity, latents, kept)
            points[f"{'topk' if kept else 'relu'}-{sparsity:g}"] = point
    return points


def _ablations(regime: str, n: int) -> dict[str, Point]:
    """All three conditions met, then each of them given up, a little and more."""
    met = Point(regime, 0.99, n, 1)
    points = {"met": met}
    for sparsity in (0.9, 0.7, 0.5):  # k is half the mean number of active features, as elsewhere
        k = round(n * (1 - sparsity) / 2)
        points[f"sparsity-{sparsity:g}"] = replace(met, sparsity=sparsity, k=k)
    points["sparsity-0.7-k-1"] = replace(met, sparsity=0.7)
    for k in (2, 4, 10, 0):
        points[f"k-{k}" if k else "relu"] = replace(met, k=k)
    for share in (1.5, 0.75, 0.5):
        points[f"latents-{share:g}"] = replace(met, latents=int(share * n))
    return points


SWEEPS: dict[str, Sweep] = {
    "toy-claim": Sweep(
        "the paper's toy experiment; W_p of a toy model trained at each S",
        _by_sparsity("toy-200"),
        ("plain", "variance-a0.5", "whitening"),
    ),
    "toy-claim-fixed": Sweep(
        "the paper's toy experiment; one W_p at every S: unit columns of low coherence",
        _by_sparsity("crowd-200"),
        ("plain", "variance-a0.5", "whitening"),
    ),
    "conditions-digons": Sweep(
        "the paper's three conditions, one given up at a time; 20 rotated digons",
        _ablations("digons-40", 40),
        ("plain", "variance-a0.5", "whitening"),
    ),
    "conditions-crowd": Sweep(
        "the paper's three conditions where n > 2 n_p: 60 unit columns of low coherence",
        _ablations("crowd-60", 60),
        ("plain", "variance-a0.5", "whitening"),
    ),
}
"""Named like experiments; none runs by default."""


@dataclass(frozen=True)
class TheoryConfig:
    """Settings of the planted experiments."""

    experiments: tuple[str, ...] = tuple(_STANDARD)
    """Names of the experiments and sweeps. Related features (``hierarchy-0.9``, ``correlated-0.9``
    and their twins ``…-off-0.9``) and the sweeps (``toy-claim``, ``toy-claim-fixed``,
    ``conditions-digons``, ``conditions-crowd``) run only if they are named."""
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
        known = [*EXPERIMENTS, *SWEEPS]
        for name in self.experiments:
            if name not in known:
                raise UsageError(f"there is no planted experiment {name!r}; {nearest(name, known)}")
        if len(set(self.experiments)) != len(self.experiments):
            raise UsageError("a planted experiment is listed twice; name each one once")
        if not self.experiments:
            raise UsageError(f"name at least one planted experiment of {', '.join(known)}")
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
