"""Computing the next items while one is used: one background thread, a bounded number ahead."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def prefetch(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """The same items, up to ``depth`` of them computed ahead in one background thread.

    Nothing starts before the first item is requested. An error of the computation is raised in
    place of its item. Closing or dropping the iterator ends the thread after its current item and
    closes the source.
    """
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
        close = getattr(source, "close", None)
        if close is not None:
            close()
