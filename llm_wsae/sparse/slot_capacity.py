"""Room for active latents whose number only the device knows.

Where a threshold decides which latents are active, a GPU finds out how many there are, and to hear
of it before the step goes on would leave it idle. So every row gets as many slots as the last rows
suggest, the step goes on, and whether that was enough is read while the device has other work. If
it was not, the step is made again with more.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from llm_wsae.hardware import DeferredScalar

_FEWEST = 64
_SPARE = 1.25  # of what the longest row needed: the next batch's may need more


class SlotCapacity:
    """How many slots a row gets, and what is heard of how many it needs."""

    def __init__(self):
        self.slots = _FEWEST
        self._longest: DeferredScalar | None = None

    def ask(self, counts: Int[Tensor, " rows"]) -> None:
        """Tell how many entries the rows have, those without a slot counted."""
        self._longest = DeferredScalar(torch.nn.functional.pad(counts, (0, 1)).max())

    @property
    def asked(self) -> bool:
        """Whether it is still to be read if there was room; never on a CPU, which gives exact."""
        return self._longest is not None

    def enough(self) -> bool:
        """Whether all entries had a slot. If not, the next ones will have, if they are as many."""
        if self._longest is None:
            return True
        longest, self._longest = int(self._longest.read()), None
        fits = longest <= self.slots
        self.slots = max(_FEWEST, 1 << int(_SPARE * longest).bit_length())
        return fits
