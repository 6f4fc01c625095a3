"""Sides in processes of their own."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dlrm.bench.harness.workers import Side, Turns, WorkerError, start_workers
from dlrm.errors import ConfigError
from dlrm.system.host import available_cores


@contextmanager
def open_side(text: str) -> Iterator[Turns]:
    """Turns that say what the process sees, and some that fail."""
    calls: list[int] = []

    def count() -> list[int]:
        calls.append(os.getpid())
        return calls

    def fail() -> None:
        if os.environ["RANK"] == "1":
            raise ConfigError(f"{text}: wrong")
        time.sleep(60)  # a rank that waits for another one

    def grow() -> int:
        return len(bytearray(64 << 20))

    turns = {"count": count, "fail": fail, "grow": grow, "die": lambda: os._exit(7)}
    yield {**turns, "environment": lambda: dict(os.environ), "cpu": time.process_time}


@contextmanager
def open_group() -> Iterator[Turns]:
    """A turn in which the ranks meet."""
    import torch
    import torch.distributed as dist

    def add() -> float:
        total = torch.tensor([float(dist.get_rank() + 1)])
        dist.all_reduce(total)
        return total.item()

    yield {"add": add}


def light(name: str, **changes: object) -> Side:
    return Side(name, open_side, (name,), ("count",), has_group=False, **changes)  # type: ignore[arg-type]


def test_turns_of_two_sides():
    with start_workers(light("first", ranks=2)) as first, start_workers(light("second")) as second:
        a = [reply.value for reply in first.take_turn("count")]
        b = [reply.value for reply in second.take_turn("count")]
        again = [reply.value for reply in first.take_turn("count")]
        pids = {*a[0], *a[1], *b[0]}
        assert len(pids | {os.getpid()}) == 4
        assert again == [a[0] * 2, a[1] * 2]  # the same processes, alive all the time
        before = [reply.value for reply in first.take_turn("cpu")]
        time.sleep(0.3)
        after = [reply.value for reply in first.take_turn("cpu")]
        assert all(stop - start < 0.05 for start, stop in zip(before, after, strict=True))
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_ranks_form_a_group():
    with start_workers(Side("ours", open_group, (), ("add",), ranks=2)) as workers:
        assert [reply.value for reply in workers.take_turn("add")] == [3.0, 3.0]


def test_environment(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    with start_workers(light("ours", ranks=2)) as ours, start_workers(light("plain", is_plain=True)) as plain:
        first, second = (reply.value for reply in ours.take_turn("environment"))
        alone = plain.take_turn("environment")[0].value
    assert (first["RANK"], second["RANK"], second["LOCAL_RANK"]) == ("0", "1", "1")
    assert first["WORLD_SIZE"] == first["LOCAL_WORLD_SIZE"] == "2"
    assert "OMP_NUM_THREADS" not in first  # the trainer decides
    assert alone["OMP_NUM_THREADS"] == str(available_cores())
    assert first["MALLOC_ARENA_MAX"] == first["THP_MEM_ALLOC_ENABLE"] == "1"
    assert not {"MALLOC_ARENA_MAX", "OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE"} & alone.keys()


def test_peak_memory_is_the_workers_own():
    ballast = bytearray(256 << 20)
    with start_workers(light("ours")) as workers:
        before = workers.take_turn("count")[0].peak_rss_gib
        after = workers.take_turn("grow")[0].peak_rss_gib
    assert len(ballast) == 256 << 20
    assert before < 0.2
    assert 0.05 < after - before < 0.1


def test_a_failing_rank_ends_the_side():
    with pytest.raises(ConfigError, match="ours: wrong"), start_workers(light("ours", ranks=2)) as workers:
        workers.take_turn("fail")
    assert all(process.poll() is not None for process in workers._processes)


def test_a_dead_rank_is_named():
    with pytest.raises(WorkerError, match="rank 0 of ours ended with 7"), start_workers(light("ours")) as workers:
        workers.take_turn("die")
