"""Slots for active latents whose number only the device knows.

Where a threshold decides which latents are active, a GPU finds out how many there are, and waiting
for that number before the step continues would leave it idle. So every row gets as many slots as
the last rows suggest, the step continues, and whether they were enough is read while the device has
other work. If they were not, the step is repeated with more.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from llm_wsae.hardware import DeferredScalar

T = TypeVar("T")

_FEWEST = 64
_SPARE = 1.25  # of what the longest row needed: the next batch's may need more


class SlotCapacity:
    """How many slots a row gets, and the report of how many it needed."""

    def __init__(self) -> None:
        self.slots = _FEWEST
        self._longest: DeferredScalar | None = None

    def report(self, counts: Int[Tensor, " rows"]) -> None:
        """Take in how many entries the rows have, including those without a slot."""
        self._longest = DeferredScalar(torch.nn.functional.pad(counts, (0, 1)).max())

    def enough(self) -> bool:
        """Whether all entries had a slot. If not, the next ones will, if they are as many."""
        if self._longest is None:
            return True
        longest, self._longest = int(self._longest.read()), None
        fits = longest <= self.slots
        self.slots = max(_FEWEST, 1 << int(_SPARE * longest).bit_length())
        return fits

    def retry(self, compute: Callable[[], T], all_agree: Callable[[bool], bool]) -> T:
        """What ``compute`` returns once all entries, in all processes, had a slot.

        On a CPU nothing is ever reported: there every entry gets a slot at once.
        """
        while True:
            result = compute()
            if self._longest is None or all_agree(self.enough()):
                return result
