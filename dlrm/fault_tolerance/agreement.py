"""Ranks decide together: to save, to stop, to give up."""

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
    """The strongest wish of all ranks, known to all of them at the same step, some steps after it was made.

    Every few steps, which take some 50 ms together, a rank starts an exchange of wishes and reads the one before:

        step       100            103            106            109
        rank 0     start a        read a         read b         read c
                                  start b (SAVE) start c        start d
        rank 1     start a        read a         read b         read c
        agreed     -              GO_ON          SAVE           GO_ON

    So no step waits for an exchange: it had the time of several steps to travel. What a wish asks for is done by all
    ranks after the same step, 106 here. Ranks measure different times for a step, so they exchange the number of steps
    between two exchanges with the wishes, and all take the largest.
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
        """The wish that all ranks agreed on; GO_ON for none. Collective. Call it after every step.

        A request that this call returns is cleared; it is not sent again.
        """
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
