"""Half-trained baselines: TopK whose encoder or decoder stays random.

Korznikov et al. 2026 (arXiv 2602.14111) find that such dictionaries come close to trained ones in
measures of interpretability. What a weighting is said to win should be more than that.
"""

from typing import Any, ClassVar, Literal

from torch import Tensor

from llm_wsae.training.architectures.topk import LargestOfRow
from llm_wsae.training.parameters import Parameters


class Frozen(LargestOfRow):
    """The biases and the other half learn."""

    half: ClassVar[Literal["encoder", "decoder"]]
    is_tied = True
    is_baseline = True

    def __init__(self, *settings: Any, **more: Any):
        super().__init__(*settings, **more)
        self._drawn: Tensor | None = None

    def tie(self, parameters: Parameters) -> None:
        """Undo what a step did to the half; the first call, before all steps, remembers it."""
        half: Tensor = getattr(parameters, self.half)
        if self._drawn is None:
            self._drawn = half.clone()
        half.copy_(self._drawn)
