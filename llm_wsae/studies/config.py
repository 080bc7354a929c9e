"""What a study compares. Free of torch, for the command line."""

from dataclasses import dataclass
from typing import get_args

from llm_wsae.errors import UsageError
from llm_wsae.outside import check_numbers
from llm_wsae.planting.config import PlantConfig
from llm_wsae.training.config import ArchitectureName
from llm_wsae.weights.config import ControlName


@dataclass(frozen=True)
class StudyConfig:
    """Rules × α × k × seeds, and the plain curve they are compared with."""

    rules: tuple[str, ...] = ("variance",)
    """Weight rules. Each brings its control."""
    alphas: tuple[float, ...] = (0.5,)
    """Exponents of the weights γ = score^α."""
    ks: tuple[int, ...] = (32,)
    """Active latents per token of the weighted dictionaries. The first is the baselines', too, of a
    study that has none yet."""
    curve: tuple[int, ...] = (16, 24, 32, 48, 64)
    """Active latents per token of the plain dictionaries: the k-curve."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each sets the initial weights, the order of the rows, and the draw of the control."""
    architecture: ArchitectureName = "topk"
    """Of all dictionaries, plain and weighted."""
    keep_dictionaries: bool = True
    """Keep every dictionary, in float32 (21 MB at 576 → 4608); otherwise each is deleted once its
    scores are written."""
    plant: PlantConfig | None = None
    """Features to plant into the rows of every training; their recovery is then measured too."""
    control: ControlName = "permuted"
    """permuted: the same weights are exchanged among all dimensions; deciles: among dimensions of
    nearly the same variance, which changes the loss's effective dimensions less; shares: the
    shares of the loss are exchanged, which keeps them. The first two are for rules with one weight
    per dimension; a matrix then gets random eigenvectors."""

    def __post_init__(self) -> None:
        for name in ("curve", "seeds"):
            if len(set(getattr(self, name))) < 2:
                raise UsageError(
                    f"a study needs at least 2 different values of {name}, not "
                    f"{', '.join(map(str, getattr(self, name))) or 'none'}: fewer allow no "
                    "comparison at equal cross-entropy, and no interval"
                )
        check_numbers(self, ks=1, curve=1)
        if self.architecture == "relu":
            raise UsageError(
                "a study compares dictionaries by k, which relu does not have; choose another "
                "architecture"
            )
        if self.control not in get_args(ControlName):
            known = ", ".join(get_args(ControlName))
            raise UsageError(f"control must be one of {known}, not {self.control!r}")
        for name in ("rules", "alphas", "ks"):
            if not getattr(self, name):
                raise UsageError(f"a study needs at least one of its {name}")

    @property
    def most_dictionaries(self) -> int:
        """How many dictionaries are measured, if every rule has weights and a control."""
        weighted = 2 * len(self.rules) * len(self.alphas) * len(self.ks)
        of_seed = len(set(self.curve)) + weighted + 2  # 2 with a frozen half
        return len(set(self.seeds)) * of_seed + 1  # the raw dimensions
