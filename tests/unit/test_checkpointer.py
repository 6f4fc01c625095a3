"""The checkpointer of one rank, on state that is no model's."""

import errno
import threading

import pytest
import torch
import torch.distributed as dist

from dlrm.checkpoint import checkpointer as checkpointers
from dlrm.checkpoint import dcp as storage
from dlrm.checkpoint.checkpoint import read_checkpoint
from dlrm.checkpoint.checkpointer import Checkpointer
from dlrm.checkpoint.find import complete_checkpoints
from dlrm.checkpoint.position import Position
from dlrm.checkpoint.store import LocalStore
from dlrm.checkpoint.tensors import Part, Parts
from dlrm.errors import CheckpointError
from dlrm.ranks.runtime import Runtime
from dlrm.system.ending import is_lost_peer

RUNTIME = Runtime(0, 0, 1, 1, torch.device("cpu"))


@pytest.fixture(autouse=True, scope="module")
def group():
    """DCP warns without one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def store(tmp_path):
    return LocalStore(str(tmp_path / "checkpoints"), tmp_path / "checkpoints")


def make(store, keep=1, copies=False, last_step=None, left_out=()):
    checkpointer = Checkpointer(store, RUNTIME, keep, copies, None, lambda: {"config.json": b"{}"}, left_out)
    checkpointer.last_step = last_step
    return checkpointer


def state_of(value):
    tensor = torch.full((4, 2), float(value))
    return {"dense.w": Parts(tensor.size(), tensor.dtype, (Part((0, 0), tensor),))}


def save(checkpointer, *steps, auroc=None):
    for step in steps:
        checkpointer.save(state_of(step), Position(step=step), auroc)
    checkpointer.finish()


def steps_in(store):
    return [found.manifest.step for found in complete_checkpoints(store)]


def test_the_newest_stay_and_the_best(store):
    checkpointer = make(store, keep=2)
    save(checkpointer, 1, 2)
    save(checkpointer, 3, auroc=0.8)
    save(checkpointer, 4, auroc=0.7)
    save(checkpointer, 5, 6)
    assert steps_in(store) == [6, 5, 3]
    assert store.leftovers() == []
    assert [saved.step for saved in checkpointer.drain()] == [1, 2, 3, 4, 5, 6]
    assert checkpointer.drain() == []


def test_what_was_left_out_stays_and_does_not_count(store):
    """When this training was resumed: it must keep what it writes itself, and not the best of another."""
    save(make(store, keep=9), 10, 50)
    save(make(store, keep=9), 60, auroc=0.9)
    checkpointer = make(store, keep=1, last_step=10, left_out=("step_0000000050", "step_0000000060"))
    save(checkpointer, 20, auroc=0.7)
    assert steps_in(store) == [60, 50, 20]
    save(checkpointer, 50)
    save(checkpointer, 70)
    assert steps_in(store) == [70, 60, 50, 20]
    assert store.names() == [f"step_00000000{step}" for step in (20, 50, 60, 70)]


def test_a_writing_thread_that_dies_is_an_error(store, monkeypatch):
    checkpointer = make(store, copies=True)

    def fail(*_, **__):
        raise KeyError

    monkeypatch.setattr(checkpointers, "save", fail)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with pytest.raises(CheckpointError, match="the thread that writes ended"):
        save(checkpointer, 1)


@pytest.mark.parametrize("copies", [False, True])
def test_a_rank_that_is_lost_while_writing_is_told_like_one_lost_in_training(store, copies, monkeypatch):
    """main.py knows such an error by its text, and leaves the word to the rank that failed."""
    checkpointer = make(store, copies=copies)

    def fail(*_, **__):
        raise RuntimeError("Read error [127.0.0.1]:8583: Connection reset by peer")

    monkeypatch.setattr(checkpointers, "save", fail)
    with pytest.raises(RuntimeError, match="Connection reset by peer") as raised:
        save(checkpointer, 1)
    assert is_lost_peer(raised.value)
    assert not isinstance(raised.value, CheckpointError)


def test_writing_is_noted_block_by_block(store, monkeypatch):
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 8)
    noted = []
    checkpointer = Checkpointer(store, RUNTIME, 1, True, None, dict, note_written=lambda: noted.append(1))
    save(checkpointer, 3)
    assert len(noted) == 4
    with store.open("step_0000000003", "rank_0.bin") as file:
        assert torch.frombuffer(bytearray(file.read()), dtype=torch.float32).tolist() == [3.0] * 8


def test_leftovers_go_when_a_run_begins(store):
    written = store.begin("step_0000000005", "aa")
    assert store.names() == [written]
    make(store)
    assert store.names() == []


@pytest.mark.parametrize("copies", [False, True])
def test_what_is_saved_is_what_was_there_then(store, copies, monkeypatch):
    """Training goes on while a copy is written."""
    may_write = threading.Event()
    begin = LocalStore.begin
    monkeypatch.setattr(LocalStore, "begin", lambda *arguments: may_write.wait(60) and begin(*arguments))
    checkpointer, state = make(store, copies=copies), state_of(7)
    if not copies:
        may_write.set()
    checkpointer.save(state, Position(step=5), None)
    state["dense.w"].parts[0].tensor.zero_()
    assert steps_in(store) == ([] if copies else [5])
    may_write.set()
    checkpointer.finish()
    checkpoint = read_checkpoint(store, "step_0000000005")
    manifest = checkpoint.manifest
    checkpoint.verify(manifest.files)
    assert sorted(manifest.files) == ["config.json", "rank_0.bin"]
    (chunk,) = manifest.tensors["dense.w"].chunks
    with store.open("step_0000000005", "rank_0.bin") as file:
        file.seek(chunk.start)
        assert torch.frombuffer(bytearray(file.read(32)), dtype=torch.float32).tolist() == [7.0] * 8


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("method", ["begin", "create", "finish"])
def test_a_full_disk(store, method, copies, monkeypatch):
    save(make(store, keep=5), 1)
    before = sorted(path.name for path in store.root.rglob("*"))
    checkpointer = make(store, copies=copies, last_step=1)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, method, fail)
        with pytest.raises(CheckpointError, match=r"can't be written \(the disk is full\)") as caught:
            save(checkpointer, 2)
    assert caught.value.everywhere
    assert checkpointer.has_failed
    with pytest.raises(CheckpointError):
        save(checkpointer, 3)  # what failed once is not forgotten
    assert sorted(path.name for path in store.root.rglob("*")) == before


def test_a_folder_that_can_no_longer_be_listed(store, monkeypatch, capsys):
    """The checkpoint is complete: training goes on."""
    checkpointer = make(store, copies=True)

    def fail(_):
        raise CheckpointError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(checkpointers, "complete_checkpoints", fail)
        save(checkpointer, 1, 2)
    assert steps_in(store) == [2, 1]
    assert "Input/output error: old checkpoints stay." in capsys.readouterr().out
    save(checkpointer, 3)
    assert steps_in(store) == [3]


def test_an_old_one_that_stays_is_named(store, monkeypatch, capsys):
    checkpointer = make(store)

    def fail(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(LocalStore, "remove", fail)
    save(checkpointer, 1, 2)
    assert steps_in(store) == [2, 1]
    assert (
        "step_0000000001: an old checkpoint that can't be removed (Operation not permitted)" in capsys.readouterr().out
    )


def test_a_run_that_ends_waits_for_what_is_being_written(store, monkeypatch):
    may_write = threading.Event()
    begin = LocalStore.begin
    monkeypatch.setattr(LocalStore, "begin", lambda *arguments: may_write.wait(60) and begin(*arguments))
    checkpointer = make(store, copies=True)
    checkpointer.save(state_of(1), Position(step=1), None)
    assert not checkpointer.settle(0.01)
    may_write.set()
    assert checkpointer.settle(60.0)
    assert steps_in(store) == [1]


def test_a_folder_that_rank_0_does_not_share(store, monkeypatch):
    def hide(_, name, file):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", f"{name}/{file}")

    monkeypatch.setattr(storage, "size_of", hide)
    with pytest.raises(CheckpointError, match=r"rank 0 does not see rank_0.bin .* that all hosts see"):
        save(make(store), 1)
    assert store.names() == []


def test_bytes_are_counted(store):
    checkpointer = make(store)
    save(checkpointer, 1)
    (saved,) = checkpointer.drain()
    manifest = read_checkpoint(store, "step_0000000001").manifest
    assert saved.num_bytes == sum(file.num_bytes for file in manifest.files.values()) == 32 + len("{}")
