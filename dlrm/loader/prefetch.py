"""Makes items on a thread, ahead of need."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

from torch.multiprocessing import _set_thread_name

T = TypeVar("T")

_SECONDS_OF_GRACE = 0.005


def prefetch(items: Iterator[T], depth: int) -> Iterator[T]:
    """Iterates over `items` on a thread: at most `depth` are ready, and one is being made.

    An exception of `items` is raised here. If the consumer stops early, the thread ends.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def produce() -> None:
        _set_thread_name("batch-builder")  # shown in traces and in top, unlike the name that Python knows
        try:
            for item in items:
                if not _put(ready, (item, None), stopped):
                    return
            _put(ready, (None, None), stopped)
        except BaseException as error:  # noqa: BLE001 - any exception is handed to the consumer
            _put(ready, (None, error), stopped)

    thread = threading.Thread(target=produce, name="batch-builder", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stopped.set()
        thread.join()


def _put(ready: "queue.Queue[T]", item: T, stopped: threading.Event) -> bool:
    was_full = ready.full()
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
            # The consumer has just taken a batch, and needs Python's lock to start its step. Making the next batch at
            # once would compete for it, so wait a moment; once the step computes, the lock is free.
            return not (was_full and stopped.wait(_SECONDS_OF_GRACE))
        except queue.Full:
            continue
    return False
