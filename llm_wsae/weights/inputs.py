"""What a rule may read of a site: the statistics, always; the rest costs a measurement.

``llm_wsae.weighing`` measures it, with a model, a store and a first dictionary.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from llm_wsae.statistics.moments import Statistics

Need = Literal["dictionary", "fisher", "coherence"]
"""What a rule may need in addition to the statistics."""


@dataclass(frozen=True)
class RuleInputs:
    """All that was measured of a site's dimensions."""

    statistics: Statistics
    decoder: Float[Tensor, "latents d_in"] | None = None
    """Decoder rows of a first dictionary, only of the latents that fire."""
    energy: Float[Tensor, " latents"] | None = None
    """How much each of those latents is used: E z², its frequency times its mean square."""
    fisher: Float[Tensor, "d_in d_in"] | None = None
    """Fisher information of the model's next-token distribution at the site."""
    coherence: Float[Tensor, " d_in"] | None = None
    """How alike the texts are that move a dimension most, beyond chance; > 0."""

    @classmethod
    def of(cls, measured: "RuleInputs | Statistics") -> "RuleInputs":
        """The inputs themselves, or those with nothing but the statistics."""
        return measured if isinstance(measured, RuleInputs) else cls(measured)

    def has(self, need: Need) -> bool:
        """Whether that was measured."""
        return getattr(self, "decoder" if need == "dictionary" else need) is not None
