import os
import signal
import threading

import pytest
import torch

from dlrm.runtime import Runtime
from dlrm.train import control
from dlrm.train.control import Agreement, StopSignals, Wish, exit_code


class Ended(BaseException):
    """In place of the process's end."""


@pytest.fixture
def ends(monkeypatch):
    def end(code):
        raise Ended(code)

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


def test_the_strongest_wish():
    assert max(Wish.SAVE, Wish.FAIL, Wish.END) is Wish.FAIL
    assert max(Wish.INTERRUPT, Wish.END, Wish.GO_ON) is Wish.END


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
        with pytest.raises(Ended, match="130"):
            send(signal.SIGINT)
    assert capfd.readouterr().err.endswith("dlrm: SIGINT again: ended\n")


def test_with_nothing_to_save_the_first_one_ends(ends, capfd):
    with StopSignals().installed() as signals:
        with pytest.raises(Ended, match="143"):
            send(signal.SIGTERM)
        with signals.saving():
            pass
        with pytest.raises(Ended, match="130"):
            send(signal.SIGINT)
    assert capfd.readouterr().err == "dlrm: SIGTERM: ended, nothing saved\ndlrm: SIGINT: ended, nothing saved\n"


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
