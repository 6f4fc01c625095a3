"""The watchdog of one rank, with the statuses of others made up."""

import json
import re
import threading
import time

import pytest
import torch

from dlrm.fault_tolerance import watchdog as watchdogs
from dlrm.fault_tolerance.watchdog import Watchdog
from dlrm.ranks.runtime import Runtime, on_main_rank

ALONE = Runtime(0, 0, 1, 1, torch.device("cpu"))


class Statuses:
    """A launcher's store in which the other ranks publish each time that this one does."""

    def __init__(self, others, silent=()):
        self._statuses = {"0": None, **{str(rank): dict(status) for rank, status in others.items()}}
        self._silent = {str(rank) for rank in silent}
        for rank in others:
            status = {"published": 1, "written": 0, "host": f"host{rank}", "place": f"place{rank}.py:1 (wait)"}
            self._statuses[str(rank)].update(status)

    def set(self, key, text):
        self._statuses[key] = json.loads(text)
        for rank, status in self._statuses.items():
            if rank not in (key, *self._silent):
                status["published"] += 1
                status["written"] += status.get("writes", 0)

    def get(self, key):
        return json.dumps(self._statuses[key]).encode()


def watch(others, silent=(), beats=0, timeout=0.08):
    watchdog = Watchdog(ALONE, timeout)
    for _ in range(beats):
        watchdog.beat("training")
    watchdog._store = Statuses(others, silent)
    watchdog._runtime = Runtime(0, 0, 1 + len(others), 1, torch.device("cpu"))
    watchdog._publish()
    return watchdog


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(watchdogs, "_SECONDS_TO_WAKE", 0.1)


def test_a_rank_that_only_stood_still_is_not_accused():
    watchdog = watch({1: {"beats": 9, "doing": "training"}, 2: {"beats": 9, "doing": "training"}}, silent=[1, 2])
    read, looks = watchdog._read_all, []

    def read_and_wake():
        looks.append(1)
        watchdog._store._silent -= {str(len(looks) - 2)}  # rank 1 wakes at the third reading, rank 2 at the fourth
        return read()

    watchdog._read_all = read_and_wake
    assert watchdog._judge() is None
    assert len(looks) == 5


def test_a_rank_that_publishes_nothing_is_the_one():
    text, accused = watch({1: {"beats": 9, "doing": "training"}}, silent=[1], beats=4)._judge()
    assert accused == [1]
    assert text == "rank 1 on host1 gives no sign of life. It was training, at place1.py:1 (wait)."


def test_a_rank_that_itself_stood_still_begins_to_count_anew(monkeypatch):
    timeout, stalls = 0.4, [0.6]
    watchdog = watch({1: {"beats": 9, "doing": "training"}}, silent=[1], timeout=timeout)
    publish, given_up = watchdog._publish, []

    def stall_once():
        if stalls:
            time.sleep(stalls.pop())
        publish()

    def give_up():
        given_up.append(time.monotonic())
        watchdog._stopped.set()

    monkeypatch.setattr(watchdog, "_publish", stall_once)
    monkeypatch.setattr(watchdog, "_give_up", give_up)
    started = watchdog._at = time.monotonic()
    watchdog._watch()
    assert given_up[0] - started > 0.6 + timeout


def test_else_the_rank_that_has_seen_the_least():
    others = {1: {"beats": 3, "doing": "reading a batch"}, 2: {"beats": 4, "doing": "training"}}
    text, accused = watch(others, beats=4)._judge()
    assert accused == [1]
    assert text == "rank 1 on host1 hangs. It was reading a batch, at place1.py:1 (wait)."


def test_several_that_are_behind():
    others = {rank: {"beats": beats, "doing": "training"} for rank, beats in ((1, 3), (2, 3), (3, 5))}
    text, accused = watch(others, beats=4)._judge()
    assert accused == [1, 2]
    assert text.startswith("rank 1 on host1, rank 2 on host2 hangs.")


def test_this_rank_may_be_the_one():
    text, accused = watch({1: {"beats": 5, "doing": "training"}}, beats=4)._judge()
    assert accused == [0]
    assert text.endswith("hangs. It was training.")


def test_no_rank_is_accused_when_all_stand_at_the_same_step():
    text, accused = watch({1: {"beats": 4, "doing": "saving a checkpoint"}}, beats=4)._judge()
    assert accused == []
    places = "rank 0 training, rank 1 saving a checkpoint, at place1.py:1 (wait)"
    assert text == f"no rank is behind the others. {places}"


def test_all_may_wait_for_a_checkpoint(exits):
    watchdog = watch({1: {"beats": 3, "doing": "writing a checkpoint", "writes": 1}}, beats=4)
    assert watchdog._judge() is None
    watchdog._at = 0.0
    watchdog._give_up()
    assert exits == []
    assert watchdog._at > 0.0


def test_a_store_that_does_not_answer(exits, capsys):
    watchdog = watch({}, beats=1)
    watchdog._store.get = refuse
    watchdog._give_up()
    assert exits == [3]
    assert "other ranks can't be asked (timed out)" in capsys.readouterr().err


def refuse(_):
    raise RuntimeError("timed out")


@pytest.fixture
def exits(monkeypatch):
    codes = []
    monkeypatch.setattr(watchdogs.os, "_exit", codes.append)
    return codes


def test_one_rank_that_is_not_accused_speaks(exits, monkeypatch, capsys):
    monkeypatch.setattr(watchdogs, "_SECONDS_FOR_VERDICT", 0.0)
    for beats, speaks in ((4, True), (2, False)):
        watch({1: {"beats": 3, "doing": "training"}}, beats=beats)._give_up()
        error = capsys.readouterr().err
        assert error.startswith("dlrm: error: no step for 0.08 s (--hang_timeout): rank 1") is speaks
        assert bool(error) is speaks
    assert exits == [3, 3]


class Clock:
    """Time that passes only as the watchdog waits; `happens` is called after each wait."""

    def __init__(self, watchdog, waits, happens):
        self.now, self._watchdog, self._waits_left, self._happens = 0.0, watchdog, waits, happens

    def monotonic(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds
        self._waits_left -= 1
        self._happens()
        return self._waits_left < 0


def watch_alone(monkeypatch, waits, happens=lambda _: None):
    watchdog = Watchdog(ALONE, 8.0)
    clock = Clock(watchdog, waits, lambda: happens(watchdog))
    monkeypatch.setattr(watchdogs, "time", clock)
    monkeypatch.setattr(watchdog, "_stopped", clock)
    watchdog.beat("reading a batch")
    watchdog._watch()


def test_a_run_alone_ends_when_it_hangs(exits, monkeypatch, capsys):
    watch_alone(monkeypatch, waits=8)
    assert exits == []
    watch_alone(monkeypatch, waits=9)
    assert exits == [3]
    error = capsys.readouterr().err
    assert error.startswith("dlrm: error: no step for 8 s (--hang_timeout): reading a batch, at ")


@pytest.mark.parametrize("sign", [lambda dog: dog.beat("training"), lambda dog: dog.note_written()])
def test_one_that_is_slow_or_writes_is_left_alone(sign, exits, monkeypatch):
    watch_alone(monkeypatch, 50, sign)
    assert exits == []


def test_one_that_is_stopped_watches_no_more():
    watchdog = Watchdog(ALONE, 600.0).start()
    assert watchdog._thread.is_alive()
    watchdog.stop()
    assert not watchdog._thread.is_alive()


def test_a_launcher_that_is_gone_ends_the_watch_and_not_the_run(exits):
    class Gone(Statuses):
        def set(self, *_):
            raise RuntimeError("Broken pipe")

    watchdog = Watchdog(ALONE, 0.2)
    watchdog._store = Gone({})
    watchdog._thread.start()
    watchdog._thread.join(10)
    assert not watchdog._thread.is_alive()
    assert exits == []


def test_where_a_thread_is():
    ended = threading.Event()
    thread = threading.Thread(target=lambda: on_main_rank(ALONE, ended.wait))
    thread.start()
    deadline = time.monotonic() + 10
    while "wait" not in watchdogs._place_of(thread.ident) and time.monotonic() < deadline:
        time.sleep(0.01)
    found = watchdogs._place_of(thread.ident)
    ended.set()
    thread.join()
    assert re.fullmatch(r"runtime\.py:\d+ \(wait\)", found)
    assert watchdogs._place_of(1) == ""


def test_no_place_on_a_system_without_files_in_memory(monkeypatch):
    monkeypatch.delattr(watchdogs.os, "memfd_create")
    assert watchdogs._place_of(threading.get_ident()) == ""


def test_frames_are_not_taken_while_the_run_is_well(monkeypatch, exits):
    """A frame's locals are held for as long as somebody has the frame."""
    taken = []
    monkeypatch.setattr(watchdogs, "_place_of", taken.append)
    monkeypatch.setattr(watchdogs.sys, "_current_frames", lambda: taken.append("frames"))
    watch_alone(monkeypatch, 50, lambda watchdog: watchdog.beat("training"))
    assert taken == exits == []
