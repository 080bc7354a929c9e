"""What a rule may read of a site: the statistics, always; the rest costs a measurement.

``llm_wsae.weights.weighing`` measures it, with a model, a store and a first dictionary.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import LlmWsaeError
from llm_wsae.statistics.moments import Statistics
from llm_wsae.statistics.second_moment import SecondMoment, shrunk

Need = Literal["dictionary", "fisher", "second_moment"]
"""What a rule may need in addition to the statistics."""

BRINGS: dict[Need, tuple[str, str]] = {
    "dictionary": ("a first dictionary", "--dictionary DICT"),
    "fisher": ("the model", "--model M"),
    "second_moment": ("the covariance of all rows", ""),
}
"""What it is, and the option of ``weigh`` that brings it; all commands measure it where it is
empty."""


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
    second_moment: SecondMoment | None = None
    """Sums over all rows, behind ``covariance``."""

    @property
    def covariance(self) -> Float[Tensor, "d_in d_in"]:
        """The covariance of all usual rows, shrunk where they are few (``shrunk``), float64.

        Raises LlmWsaeError if there are fewer rows than dimensions.
        """
        assert self.second_moment is not None
        check_rows_of_covariance(self.second_moment.count, self.statistics.d_in)
        return shrunk(self.second_moment.covariance(), self.second_moment.count)

    @classmethod
    def of(cls, measured: "RuleInputs | Statistics") -> "RuleInputs":
        """The inputs themselves, or those with nothing but the statistics."""
        return measured if isinstance(measured, RuleInputs) else cls(measured)

    def has(self, need: Need) -> bool:
        """Whether that was measured."""
        return getattr(self, "decoder" if need == "dictionary" else need) is not None


def check_rows_of_covariance(rows: int, d_in: int) -> None:
    """Raise LlmWsaeError if there are too few rows to measure a covariance of."""
    if rows <= d_in:
        raise LlmWsaeError(
            f"{rows:,} rows are too few for the covariance of {d_in:,} dimensions; harvest at "
            f"least {10 * d_in:,} tokens, or raise --statistics-tokens of a stream to that"
        )
