"""The settings of the toy experiment, free of torch: the command line imports them."""

from dataclasses import dataclass

from llm_wsae.errors import UsageError
from llm_wsae.outside import SHARE, check_numbers


@dataclass(frozen=True)
class TheoryConfig:
    """Settings of the toy experiment: 200 features in 20 dimensions, 200 latents."""

    sparsity: tuple[float, ...] = (0.9, 0.95, 0.99)
    """Probabilities that a feature is 0. A toy model is trained at each, and dictionaries on it."""
    rule: tuple[str, ...] = ("uniform", "variance", "whitening")
    """Weight rules, as in `train`; uniform is the plain SAE."""
    alpha: float = 0.5
    """Exponent of the weights."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the toy model, the rows and the initial weights, which all rules share."""
    steps: int = 2000
    """Steps of each dictionary, of 256 rows."""

    def __post_init__(self) -> None:
        check_numbers(self, sparsity=SHARE, steps=1)
        if max(self.sparsity, default=0) == 1:
            raise UsageError("at a sparsity of 1 there is no feature to find; take a lower one")
        if not (self.sparsity and self.rule and self.seeds):
            raise UsageError("name at least one sparsity, one rule and one seed")
