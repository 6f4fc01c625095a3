"""Work that threads do side by side, with results in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(
    pool: ThreadPoolExecutor, items: Iterable[T], function: Callable[[T], R], ahead: int
) -> Iterator[tuple[T, R]]:
    """Results of `function`, run on threads, in the order of `items`, of which `ahead` are under way at most.

    Before an exception leaves, work that has begun is waited for, so that nothing writes after it.
    """
    pending: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) > ahead:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        for _, future in pending:
            future.cancel()
        wait([future for _, future in pending])
