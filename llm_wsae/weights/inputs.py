"""What rules may know of a site. The statistics are always there; the rest costs a measurement.

``llm_wsae.weighing`` gathers it from a model, a store and a first dictionary.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from llm_wsae.statistics.moments import Statistics

Need = Literal["dictionary", "fisher", "coherence"]
"""What a rule may need beyond the statistics."""


@dataclass(frozen=True)
class RuleInputs:
    """All that was measured of a site's dimensions."""

    statistics: Statistics
    decoder: Float[Tensor, "latents d_in"] | None = None
    """Decoder rows of a first dictionary, those of the latents that fire."""
    energy: Float[Tensor, " latents"] | None = None
    """How much each of those latents is used: E z², its frequency times its mean square."""
    fisher: Float[Tensor, "d_in d_in"] | None = None
    """Fisher information of the model's next-token distribution at the site."""
    coherence: Float[Tensor, " d_in"] | None = None
    """How alike the texts are that move a dimension most, beyond chance; > 0."""

    @classmethod
    def of(cls, known: "RuleInputs | Statistics") -> "RuleInputs":
        """Itself, or the inputs of the statistics alone."""
        return known if isinstance(known, RuleInputs) else cls(known)

    def has(self, need: Need) -> bool:
        """Whether that was measured."""
        return getattr(self, "decoder" if need == "dictionary" else need) is not None
