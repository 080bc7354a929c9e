"""The processes of one training: the strategy that distributes it, and what they agree on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from llm_wsae.machine.processes import Collectives, Processes, Several, collectives
from llm_wsae.training.config import Shard
from llm_wsae.training.parallel.strategy import SINGLE, DataParallel, LatentParallel, Strategy

CONTINUE, SAVE, STOP, FAIL = range(4)
"""What a process may want after a step; the largest one wins. One that fails has no next rows."""

_STRATEGIES: dict[Shard, Callable[[Collectives], Strategy]] = {
    "rows": DataParallel,
    "latents": LatentParallel,
}


class ProcessGroup(NamedTuple):
    """All processes of one training."""

    processes: Processes
    strategy: Strategy = SINGLE
    collectives: Collectives | None = None
    """None where there is one process."""

    def agree(self, want: Callable[[], int]) -> Callable[[], int]:
        """Start to agree on the largest of what all processes want; the returned function waits
        for the answer.

        ``want`` is called at the start of a step, so that the answer is there when the step ends.
        A single process calls it at the end.
        """
        if self.collectives is None:
            return want
        largest, collectives = torch.tensor(want()), self.collectives
        work = collectives.begin_max(largest)

        def agreed() -> int:
            collectives.end(work)
            return int(largest)

        return agreed


@contextmanager
def process_group(
    processes: Processes, device: torch.device, shard: Shard
) -> Iterator[ProcessGroup]:
    """Connect the processes for a training on ``device``, until the block ends or fails."""
    if not isinstance(processes, Several):
        yield ProcessGroup(processes)
        return
    with collectives(processes, device) as connected:
        yield ProcessGroup(processes, _STRATEGIES[shard](connected), connected)
