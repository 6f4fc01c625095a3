"""One process at a time in a folder, with flock and without."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from dlrm.errors import ConfigError, RunDirectoryError
from dlrm.preprocess.command import preprocess
from dlrm.preprocess.ranks import Ranks
from dlrm.system import lock
from dlrm.system.lock import FileLock, Locks
from tests.unit.preprocessed import config_of, digests, write


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def without_flock(request, monkeypatch):
    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    return os.strerror(request.param)


def test_a_lock_is_one_processs_alone(tmp_path):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.take() is None
    assert second.take() == "another run is using it"
    first.release()
    assert second.take() is None
    second.remove()
    assert list(tmp_path.iterdir()) == []


def test_without_flock_a_file_keeps_others_out(tmp_path, without_flock, capsys):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.take() is None
    said = f"{tmp_path}: its file system has no locks ({without_flock}). lock.owner keeps other runs out.\n"
    assert capsys.readouterr().out == said
    owner = json.loads((tmp_path / "lock.owner").read_text())
    assert owner["pid"] == os.getpid()
    obstacle = second.take()
    assert f"process {os.getpid()} of host {owner['host']} has been using it since {owner['since']}, as" in obstacle
    assert obstacle.endswith(f"{tmp_path}/lock.owner says. If that process is gone, remove that file")
    first.release()
    assert not (tmp_path / "lock.owner").exists()
    assert second.take() is None
    second.remove()
    assert list(tmp_path.iterdir()) == []


def remains(path, **changes):
    """What a process of this machine that has ended left behind."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(60)
    owner = {**lock._describe_this_process(), "pid": ended.pid, "started": "1", **changes}
    path.write_text(json.dumps(owner))


def test_what_a_killed_process_of_this_machine_left_gives_way(tmp_path, without_flock):
    remains(tmp_path / "lock.owner")
    taken = FileLock(tmp_path / "lock")
    assert taken.take() is None
    assert json.loads((tmp_path / "lock.owner").read_text())["pid"] == os.getpid()
    remains(tmp_path / "lock.owner", pid=os.getpid())  # another process that had our number
    assert FileLock(tmp_path / "lock").take() is None


@pytest.mark.parametrize("changes", [{"machine": "of another host", "host": "node7"}, {"machine": None}, {"pid": "?"}])
def test_of_another_machine_nothing_is_guessed(changes, tmp_path, without_flock):
    remains(tmp_path / "lock.owner", **changes)
    assert "If that process is gone, remove that file" in FileLock(tmp_path / "lock").take()


@pytest.mark.parametrize("content", ["", "no json", "[]"])
def test_an_owner_that_cannot_be_read_counts(content, tmp_path, without_flock):
    (tmp_path / "lock.owner").write_text(content)
    assert "process ? of host ? has been using it" in FileLock(tmp_path / "lock").take()


def test_a_host_with_flock_heeds_one_without(tmp_path):
    remains(tmp_path / "lock.owner", machine="of another host", host="node7")
    assert "of host node7 has been using it" in FileLock(tmp_path / "lock").take()


def test_of_two_that_find_the_same_remains_one_wins(tmp_path, without_flock, monkeypatch):
    remains(tmp_path / "lock.owner")
    second = FileLock(tmp_path / "lock")
    usual = lock._is_gone

    def let_another_in(owner):
        gone = usual(owner)
        monkeypatch.setattr(lock, "_is_gone", usual)
        assert FileLock(tmp_path / "lock").take() is None
        return gone

    monkeypatch.setattr(lock, "_is_gone", let_another_in)
    assert second.take() == "another run is using it"


def test_other_errors_are_not_taken_for_a_missing_flock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        FileLock(tmp_path / "lock").take()


def test_nfs_wants_the_file_open_for_writing_and_no_other_does(tmp_path, monkeypatch):
    flock, modes = lock.fcntl.flock, []

    def as_nfs(handle, operation):
        modes.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE)
        if modes[-1] == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(handle, operation)

    monkeypatch.setattr(lock.fcntl, "flock", as_nfs)
    first = FileLock(tmp_path / "lock")
    assert first.take() is None
    assert FileLock(tmp_path / "lock").take() == "another run is using it"
    assert modes == [os.O_RDONLY, os.O_RDWR] * 2


def test_a_run_without_flock(tmp_path, without_flock, monkeypatch):
    monkeypatch.setattr(lock, "_SECONDS", 0.3)
    with Locks() as locks:
        locks.take(tmp_path, "--run_dir run")
        with Locks() as others, pytest.raises(RunDirectoryError, match=r"--run_dir run: process .* remove that file"):
            others.take(tmp_path, "--run_dir run")
    with Locks() as others:
        others.take(tmp_path, "--run_dir run")


def test_preprocessing_without_flock(raw, without_flock, capsys):
    folder = write(raw)
    assert capsys.readouterr().out.count("has no locks") == 1
    assert not (raw.parent / "days.partial").exists()
    (raw.parent / "other.partial").mkdir()
    remains(raw.parent / "other.partial" / "lock.owner", host="node7", machine="of another host")
    with pytest.raises(ConfigError, match=r"other.partial: process .* of host node7 .* remove that file"):
        preprocess(config_of(raw, output="other"), Ranks())
    (raw.parent / "other.partial" / "lock.owner").unlink()
    assert digests(write(raw, output="other")) == digests(folder)
