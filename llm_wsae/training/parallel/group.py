"""Those who train together: the processes, what each has of the training, what they agree on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from llm_wsae.processes import Processes, Several
from llm_wsae.training.config import Shard
from llm_wsae.training.parallel.collectives import Collectives, collectives
from llm_wsae.training.parallel.data_parallel import SplitRows
from llm_wsae.training.parallel.latent_parallel import SplitLatents
from llm_wsae.training.parallel.strategy import ALONE, Split

GO_ON, SAVE, STOP = range(3)
"""What a process may wish for after a step; the larger one wins."""

_SPLITS: dict[Shard, Callable[[Collectives], Split]] = {"rows": SplitRows, "latents": SplitLatents}


class Team(NamedTuple):
    """All processes of one training."""

    processes: Processes
    split: Split = ALONE
    collectives: Collectives | None = None
    """None where there is one process."""

    def agree(self, wish: Callable[[], int]) -> Callable[[], int]:
        """Begin to agree on the largest wish of all; the function that is returned waits for it.

        It is asked for at the start of a step, so that the answer is there when the step ends. One
        alone is asked at the end.
        """
        if self.collectives is None:
            return wish
        largest, everyone = torch.tensor(wish()), self.collectives
        work = everyone.begin_max(largest)

        def agreed() -> int:
            everyone.end(work)
            return int(largest)

        return agreed


@contextmanager
def team_of(processes: Processes, device: torch.device, shard: Shard) -> Iterator[Team]:
    """Connect the processes for a training on ``device``, until the block ends or fails."""
    if not isinstance(processes, Several):
        yield Team(processes)
        return
    with collectives(processes, device) as connected:
        yield Team(processes, _SPLITS[shard](connected), connected)
