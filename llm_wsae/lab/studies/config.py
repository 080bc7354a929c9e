"""What a study compares. Free of torch, for the command line."""

from dataclasses import dataclass

from llm_wsae.errors import UsageError
from llm_wsae.lab.planting.config import PlantConfig
from llm_wsae.outside import check_numbers
from llm_wsae.training.config import ArchitectureName


@dataclass(frozen=True)
class StudyConfig:
    """Rules × α × k × seeds, each beside the plain dictionary of the same k and seed."""

    rules: tuple[str, ...] = ("variance",)
    """Weight rules. Each brings its control."""
    alphas: tuple[float, ...] = (0.5,)
    """Exponents of the weights γ = score^α."""
    ks: tuple[int, ...] = (32,)
    """Active latents per token, of plain and weighted dictionaries alike. The baselines have the
    first."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each sets the initial weights, the order of the rows, and the draw of the control."""
    architecture: ArchitectureName = "topk"
    """Of all dictionaries, plain and weighted."""
    keep_dictionaries: bool = True
    """Keep every dictionary, in float32 (21 MB at 576 → 4608); otherwise each is deleted once its
    scores are written."""
    plant: PlantConfig | None = None
    """Features to plant into the rows of every training; their recovery is then measured too."""

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < 2:
            raise UsageError(
                "a study needs at least 2 different seeds, not "
                f"{', '.join(map(str, self.seeds)) or 'none'}: one allows no interval"
            )
        check_numbers(self, ks=1)
        if self.architecture == "relu":
            raise UsageError(
                "a study compares dictionaries of the same k, which relu does not have; choose "
                "another architecture"
            )
        for name in ("rules", "alphas", "ks"):
            if not getattr(self, name):
                raise UsageError(f"a study needs at least one of its {name}")
