"""What ranks decide together: to save, to stop, to give up."""

import time
from enum import IntEnum

import torch
import torch.distributed as dist

from dlrm.ranks.runtime import Runtime, new_control_group

_SECONDS_BETWEEN = 0.05
_MOST_STEPS_BETWEEN = 100


class Wish(IntEnum):
    """What a rank wants; all ranks act on the strongest wish. A signal's name is the wish to save and end by it."""

    GO_ON = 0
    SAVE = 1
    SIGHUP = 2
    SIGQUIT = 3
    SIGUSR1 = 4
    SIGUSR2 = 5
    SIGXCPU = 6
    SIGINT = 7
    SIGTERM = 8
    FAIL = 9


class Agreement:
    """The strongest wish of all ranks, known to all at the same step, some steps after it was made.

    Ranks exchange wishes about every 50 ms. An exchange is started at one of those steps and looked at in the next, so
    that no step waits for it.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._group = new_control_group(runtime.world_size)
        self._is_alone = runtime.world_size == 1
        self._sent = torch.zeros(2, dtype=torch.int64)
        self._work: dist.Work | None = None
        self._steps_left = 0
        self._steps_between = 1
        self._since = time.perf_counter()

    def reach(self, wish: Wish) -> Wish:
        """Call at every step. Collective. What is agreed on is not asked for again in the same breath."""
        if self._is_alone:
            return wish
        if self._steps_left:
            self._steps_left -= 1
            return Wish.GO_ON
        now = time.perf_counter()
        seconds_a_step = (now - self._since) / self._steps_between
        self._since = now
        agreed = Wish.GO_ON
        if self._work is not None:
            self._work.wait()
            agreed, self._steps_between = Wish(int(self._sent[0])), int(self._sent[1])
        steps = min(_MOST_STEPS_BETWEEN, max(1, int(_SECONDS_BETWEEN / max(seconds_a_step, 1e-9))))
        self._sent = torch.tensor([wish if wish > agreed else Wish.GO_ON, steps])
        self._work = dist.all_reduce(self._sent, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._steps_left = self._steps_between - 1
        return agreed
