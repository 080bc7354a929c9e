"""Work in threads: ``map`` over the cores, and the next items computed while one is used.

A small model's forward pass is many small operations. If each is split over all cores, cores
wait for each other after every one; so each takes contexts of its own (``parallel_map``).
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
_END = object()


def parallel_map(work: Callable[[Item], Result], pieces: Sequence[Item]) -> list[Result]:
    """``work`` of every piece, in order. It must set modes such as ``no_grad`` itself. The first
    error among the pieces is raised once all have ended."""
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


def prefetch(items: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    """The same items, up to ``depth`` of them computed ahead in one background thread, once the
    first is requested. An error is raised in place of its item. Closing or dropping the iterator
    ends the thread after its current item and closes the source."""
    source = iter(items)
    ahead: deque[Future] = deque()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        for _ in range(depth):
            ahead.append(pool.submit(next, source, _END))
        while True:
            item = ahead.popleft().result()
            if item is _END:
                return
            ahead.append(pool.submit(next, source, _END))
            yield item
            del item  # otherwise one more than promised stays in memory
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(source, Generator):
            source.close()
