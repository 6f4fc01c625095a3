import os
import signal
import threading
from itertools import pairwise

import pytest
import torch

from dlrm.runtime import Runtime
from dlrm.train import control
from dlrm.train.control import Agreement, Ended, StopSignals, Wish, exit_code


class Exited(BaseException):
    """In place of the process's end."""


@pytest.fixture
def ends(monkeypatch):
    def end(code):
        raise Exited(code)

    monkeypatch.setattr(control.os, "_exit", end)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(control.time, "monotonic", lambda: now[0])
    return now


def send(number):
    os.kill(os.getpid(), number)


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


@pytest.mark.parametrize("wishes", [(Wish.SAVE, Wish.END), (Wish.FAIL, Wish.INTERRUPT), (Wish.GO_ON, Wish.SAVE)])
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_is_a_request(number, code, ends, capfd):
    with StopSignals().installed() as signals, signals.saving():
        assert signals.received is None
        send(number)
        assert signals.received is number
    assert exit_code(number) == code
    assert capfd.readouterr().err == (
        f"dlrm: {number.name}: saving a checkpoint, then ending. Send it again to end at once.\n"
    )


def test_a_second_one_ends_at_once_unless_it_comes_with_the_first(ends, clock, capfd):
    with StopSignals().installed() as signals, signals.saving():
        send(signal.SIGTERM)
        clock[0] += 0.9
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert signals.received is signal.SIGTERM
        clock[0] += 0.2
        with pytest.raises(Exited, match="130"):
            send(signal.SIGINT)
    assert capfd.readouterr().err.endswith("dlrm: SIGINT again: ended\n")


def test_with_nothing_to_save_the_first_one_ends(ends, clock, capfd):
    with StopSignals().installed() as signals:
        with signals.saving():
            pass
        with pytest.raises(Ended, match="SIGTERM") as caught:
            send(signal.SIGTERM)
        assert caught.value.number is signal.SIGTERM
        send(signal.SIGINT)
        clock[0] += 1.1
        with pytest.raises(Exited, match="130"):
            send(signal.SIGINT)
    assert capfd.readouterr().err == "dlrm: SIGTERM: ended, nothing saved\ndlrm: SIGINT again: ended\n"


def test_one_rank_says_it(ends, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    with StopSignals().installed() as signals, signals.saving():
        send(signal.SIGTERM)
    assert signals.received is signal.SIGTERM
    assert capfd.readouterr().err == ""


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals().installed():
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] != before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_another_thread_does_not_listen():
    found = []

    def work():
        with StopSignals().installed() as signals:
            found.append((signals.received, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]
