from itertools import pairwise

import pytest
import torch

from dlrm.fault_tolerance import agreement as control
from dlrm.fault_tolerance.agreement import Agreement, Wish
from dlrm.ranks.runtime import Runtime
from dlrm.system import signals


def test_a_rank_alone_agrees_with_itself():
    agreement = Agreement(Runtime(0, 0, 1, 1, torch.device("cpu")))
    assert [agreement.reach(wish) for wish in Wish] == list(Wish)


class Exchange:
    """All-reduces of two ranks that are called in turn."""

    def __init__(self, sent):
        self.sent = sent

    def wait(self):
        largest = torch.stack(self.sent).amax(0)
        for tensor in self.sent:
            tensor.copy_(largest)


@pytest.fixture
def reach(monkeypatch):
    """`reach(wish, wish)`: what two ranks agree on at a step of 10 ms, and whether they exchanged wishes."""
    posted = []

    def all_reduce(tensor, **_):
        if not posted or len(posted[-1].sent) == 2:
            posted.append(Exchange([]))
        posted[-1].sent.append(tensor)
        return posted[-1]

    now = [0.0]
    monkeypatch.setattr(control.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(control, "new_control_group", lambda _: None)
    monkeypatch.setattr(control.time, "perf_counter", lambda: now[0])
    ranks = [Agreement(Runtime(rank, rank, 2, 2, torch.device("cpu"))) for rank in range(2)]

    def step(*wishes):
        now[0] += 0.01
        before = len(posted)
        agreed = {rank.reach(wish) for rank, wish in zip(ranks, wishes, strict=True)}
        assert len(agreed) == 1
        return agreed.pop(), len(posted) > before

    return step


@pytest.mark.parametrize(
    "wishes",
    [(Wish.SAVE, Wish.SIGUSR1), (Wish.SIGUSR1, Wish.SIGTERM), (Wish.FAIL, Wish.SIGINT), (Wish.GO_ON, Wish.SAVE)],
)
def test_the_strongest_wish_reaches_all_at_the_same_step(reach, wishes):
    assert {reach(*wishes)[0] for _ in range(20)} == {Wish.GO_ON, max(wishes)}


def test_what_is_wished_until_it_is_agreed_on_is_agreed_on_once(reach):
    agreed, wish = [], Wish.SAVE
    for _ in range(40):
        agreed.append(reach(wish, Wish.GO_ON)[0])
        if agreed[-1] is Wish.SAVE:
            wish = Wish.GO_ON
    assert agreed.count(Wish.SAVE) == 1


def test_ranks_exchange_wishes_every_50_ms(reach):
    exchanges = [number for number in range(100) if reach(Wish.GO_ON, Wish.GO_ON)[1]]
    gaps = [after - before for before, after in pairwise(exchanges[3:])]
    assert set(gaps) <= {4, 5}


def test_each_signal_that_is_heard_is_a_wish():
    """A rank that a signal has reached wishes to end by that one, which all ranks then do."""
    for number in (*signals._URGENT, *signals._OTHERS):
        assert Wish.SAVE < Wish[number.name] < Wish.FAIL
