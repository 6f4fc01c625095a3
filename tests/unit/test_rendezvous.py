import threading

import pytest
import torch.distributed as dist

from dlrm.ranks import rendezvous
from dlrm.ranks.rendezvous import open_launch_store

WORLD = 3


@pytest.fixture
def launcher(monkeypatch):
    """The store that a launcher keeps for all starts of a job."""
    store = dist.HashStore()
    monkeypatch.setattr(rendezvous, "rendezvous", lambda *_, **__: iter([(store, 0, 0)]))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def start(ranks, world_size=WORLD):
    """Starts threads for ranks; gives what each one opens."""
    opened = {}

    def enter(rank):
        opened[rank] = open_launch_store(rank, world_size)

    threads = [threading.Thread(target=enter, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    return opened, threads


def finish(threads):
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_ranks_of_one_start_share_keys_that_no_other_start_sees(launcher):
    for attempt, world_size in enumerate((WORLD, WORLD, 2, 4)):
        opened, threads = start(range(world_size), world_size)
        finish(threads)
        for store in opened.values():
            assert not store.check(["seen"])
        opened[world_size - 1].set("seen", str(attempt))
        assert {store.get("seen") for store in opened.values()} == {str(attempt).encode()}


@pytest.mark.parametrize("early", [[0], [1, 2], [0, 2]])
def test_a_start_that_was_not_completed(early, launcher, monkeypatch):
    monkeypatch.setattr(rendezvous, "_TIMEOUT", rendezvous.timedelta(seconds=0.3))
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # they give up, as they should
    opened, threads = start(early)
    finish(threads)
    assert not opened
    monkeypatch.setattr(rendezvous, "_TIMEOUT", rendezvous.timedelta(seconds=20))
    opened, threads = start(range(WORLD))
    finish(threads)
    opened[0].set("seen", "now")
    assert {store.get("seen") for store in opened.values()} == {b"now"}


def test_a_rank_that_comes_back_with_another_token(launcher):
    """Rank 0 has called the token that a rank's earlier life has left, when the rank itself arrives."""
    dist.PrefixStore("dlrm/start", launcher).set("token/1", "old")
    opened, threads = start([0], 2)
    meeting = dist.PrefixStore("dlrm/start", launcher)
    while not meeting.check(["call"]):
        pass
    later, more = start([1], 2)
    finish(threads + more)
    opened[0].set("seen", "now")
    assert later[1].get("seen") == b"now"


def test_without_a_launcher_that_keeps_the_store(launcher, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert open_launch_store(1, 2) is launcher
