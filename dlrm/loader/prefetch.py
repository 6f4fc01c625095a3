"""Items made ahead of need."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

from torch.multiprocessing import _set_thread_name

T = TypeVar("T")

_SECONDS_OF_GRACE = 0.005


def prefetch(items: Iterator[T], depth: int) -> Iterator[T]:
    """Runs `items` on a thread, `depth` ready and one in the making at most; its exceptions come out here.

    The thread ends when the consumer stops early.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def produce() -> None:
        _set_thread_name("batch-builder")  # in traces and in top; threading's own name stays inside Python
        try:
            for item in items:
                if not _put(ready, (item, None), stopped):
                    return
            _put(ready, (None, None), stopped)
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, whatever it is
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
            # The consumer has just taken a batch: wait until it computes, when it does not need Python's lock.
            return not (was_full and stopped.wait(_SECONDS_OF_GRACE))
        except queue.Full:
            continue
    return False
