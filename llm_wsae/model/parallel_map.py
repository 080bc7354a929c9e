"""``map`` over CPU threads, each with its share of the cores.

A small model's forward pass is many small operations. Splitting each of them over all cores leaves
cores waiting for each other after every one, and a batch's activations overflow the caches.
Contexts do not depend on each other, so each core may as well take its own.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")


def parallel_map(work: Callable[[_Piece], _Result], pieces: Sequence[_Piece]) -> list[_Result]:
    """``work`` of every piece, in order.

    The threads do not inherit modes of the caller such as ``no_grad``: ``work`` sets its own. The
    first error among the pieces is raised once all have ended.
    """
    cores = torch.get_num_threads()
    workers = min(cores, len(pieces))
    if workers < 2:
        return [work(piece) for piece in pieces]
    share = cores // workers
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool:
        try:
            return list(pool.map(work, pieces))
        finally:
            torch.set_num_threads(cores)  # later threads start with this value too
