import os
import signal
import sys
import threading

import pytest

from dlrm.system import signals as module
from dlrm.system.signals import Ended, StopSignals, ended_by_signals, exit_code, say

REQUESTS = ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"]


class Exited(BaseException):
    """In place of the process's end."""


@pytest.fixture
def ends(monkeypatch):
    def end(code):
        raise Exited(code)

    monkeypatch.setattr(module.os, "_exit", end)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture(autouse=True)
def default_handlers():
    """Each signal as a new process has it, whatever started the tests, and whatever torchx has left in others."""
    numbers = [signal.Signals[name] for name in REQUESTS if name != "SIGINT"]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("name", REQUESTS)
def test_the_first_signal_is_a_request(name, ends, capfd):
    number = signal.Signals[name]
    with StopSignals().installed() as signals, signals.saving():
        assert signals.received is None
        send(number)
        assert signals.received is number
    assert exit_code(number) == 128 + int(number)
    again = " Send it again to end at once." if name in ("SIGTERM", "SIGINT") else ""
    assert capfd.readouterr().err == f"dlrm: {name}: saving a checkpoint, then ending.{again}\n"


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


def test_a_scheduler_may_send_its_signals_until_all_is_saved(ends, clock, capfd):
    """SIGXCPU comes every second, a terminal's SIGHUP twice, and SIGTERM when the time is over."""
    with StopSignals().installed() as signals, signals.saving():
        for number in [signal.SIGUSR1, signal.SIGXCPU, signal.SIGXCPU, signal.SIGHUP, signal.SIGTERM]:
            send(number)
            clock[0] += 5
        assert signals.received is signal.SIGUSR1
        with pytest.raises(Exited, match="143"):
            send(signal.SIGTERM)
    assert [line.removeprefix("dlrm: ") for line in capfd.readouterr().err.splitlines()] == [
        "SIGUSR1: saving a checkpoint, then ending.",
        "SIGTERM: saving a checkpoint, then ending. Send it again to end at once.",
        "SIGTERM again: ended",
    ]


def test_in_a_process_that_has_more_to_do_a_second_one_raises(clock):
    with StopSignals(ends_process=False).installed() as signals, signals.saving():
        send(signal.SIGINT)
        clock[0] += 1.1
        with pytest.raises(Ended, match="SIGINT"):
            send(signal.SIGINT)


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


class Gone:
    """A stream whose terminal has gone, or a notebook's."""

    def __init__(self, fails):
        self.fails, self.written = fails, ""

    def isatty(self):
        return False

    def fileno(self):
        raise OSError(5, "no descriptor")

    def write(self, text):
        if self.fails:
            raise OSError(5, "Input/output error")
        self.written += text


@pytest.mark.parametrize("stream", [None, Gone(fails=True)])
def test_a_terminal_that_has_gone_does_not_matter(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    with StopSignals().installed() as signals, signals.saving():
        send(signal.SIGHUP)
        assert signals.received is signal.SIGHUP


def test_a_notebook_shows_it(monkeypatch):
    stream = Gone(fails=False)
    monkeypatch.setattr(sys, "stderr", stream)
    say("ein schöner Lauf")
    assert stream.written == "dlrm: ein schöner Lauf\n"


@pytest.mark.parametrize("listening", [lambda: StopSignals().installed(), ended_by_signals])
def test_handlers_are_put_back(listening):
    before = [signal.getsignal(number) for number in map(signal.Signals.__getitem__, REQUESTS)]
    with listening():
        assert [signal.getsignal(number) for number in map(signal.Signals.__getitem__, REQUESTS)] != before
    assert [signal.getsignal(number) for number in map(signal.Signals.__getitem__, REQUESTS)] == before


@pytest.mark.parametrize("listening", [lambda: StopSignals().installed(), ended_by_signals])
def test_what_nohup_has_ignored_stays_ignored(listening):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with listening():
        send(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("listening", [lambda: StopSignals().installed(), ended_by_signals])
def test_another_thread_does_not_listen(listening):
    found = []

    def work():
        with listening():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize("name", ["SIGTERM", *REQUESTS[2:]])
def test_commands_end_by_an_exception(name, clock):
    number = signal.Signals[name]
    with ended_by_signals():
        with pytest.raises(Ended, match=name):
            send(number)
        send(number)  # a launcher's
        clock[0] += 1.1
        send(signal.SIGHUP)
        with pytest.raises(Ended, match="SIGTERM"):
            send(signal.SIGTERM)
