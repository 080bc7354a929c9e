"""Pieces of work side by side on the CPU, each on its share of the cores.

A small model's forward is many small operations. Shared out one by one among cores they leave
cores waiting for each other after every one, and a batch's activations fill the caches twice over;
contexts have nothing to do with each other, so each core may as well take its own.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")


def side_by_side(work: Callable[[_Piece], _Result], pieces: Sequence[_Piece]) -> list[_Result]:
    """``work`` of every piece, in order. Modes of the calling thread, such as ``no_grad``, are not
    those of the others: ``work`` sets its own.

    The first error among the pieces is raised once all have ended.
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
            torch.set_num_threads(cores)  # it is also what any later thread begins with
