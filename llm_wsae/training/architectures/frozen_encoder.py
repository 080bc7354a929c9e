"""Half-trained baselines: TopK whose encoder or decoder stays random. Korznikov et al. 2026 (arXiv
2602.14111) find that they come close to trained ones in measures of interpretability; a weighting
should win more than that."""

from typing import Any, ClassVar, Literal

from torch import Tensor

from llm_wsae.training.architecture import Parameters
from llm_wsae.training.architectures.topk import LargestOfRow


class Frozen(LargestOfRow):
    """The biases and the other half learn."""

    half: ClassVar[Literal["encoder", "decoder"]]
    is_baseline = True

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self._drawn: Tensor | None = None

    def tie(self, parameters: Parameters) -> bool:
        """Undo what a step did to the half; the first call, before all steps, remembers it."""
        half: Tensor = getattr(parameters, self.half)
        if self._drawn is None:
            self._drawn = half.clone()
        half.copy_(self._drawn)
        return True


class FrozenEncoder(Frozen):
    """A baseline: the Frozen Encoder of Korznikov et al."""

    name = "frozen-encoder"
    half = "encoder"


ARCHITECTURE = FrozenEncoder
