"""Keeps two runs out of one folder."""

import errno
import fcntl
import json
import os
import platform
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from typing_extensions import Self

from dlrm.errors import RunDirectoryError, reason_of

LOCK = ".lock"
_SECONDS = 60.0
_OWNER = ".owner"
_IN_USE = "another run is using it"
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
"""Errors of flock on Lustre that is mounted without `-o flock`, on NFS without a lock service, and on some FUSE."""


class FileLock:
    """A lock that goes with this process, however it ends: flock's.

    A file system without flock gets a file beside the lock in its place, with the host, the process and when that
    began. Only one process can create it. It is removed at the end; what a killed process left gives way to a process
    of the same host, which can see that the other is gone. Nobody guesses about another host: the user is told.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        self._owner_path = path.with_name(path.name + _OWNER)
        self._owner: dict[str, Any] | None = None

    def take(self) -> str | None:
        """Takes the lock; if another process has it, what is known of that process.

        Raises:
            OSError: if the file can't be made.
        """
        self._handle = os.open(self.path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        obstacle: str | None = _IN_USE
        try:
            try:
                self._lock()
            except BlockingIOError:
                return obstacle
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                obstacle = self._own(error)
            else:
                obstacle = self._displace() if self._is_there(self._handle) else obstacle
            return obstacle
        finally:
            if obstacle is not None:
                self.release()

    def _lock(self) -> None:
        """By flock. NFS refuses a file that is open for reading alone; elsewhere such a file may be another user's."""
        assert self._handle is not None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            os.close(self._handle)
            self._handle = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _is_there(self, handle: int) -> bool:
        """Whether the open file still has its name: a run that has just ended may have removed it."""
        with suppress(FileNotFoundError):
            return os.fstat(handle).st_ino == self.path.stat().st_ino
        return False

    @property
    def files(self) -> tuple[Path, Path]:
        """The lock, and what takes its place."""
        return self.path, self._owner_path

    def remove(self) -> None:
        """Lets others in, and leaves no file."""
        self.path.unlink()
        self.release()

    def release(self) -> None:
        """Lets others in. The file stays."""
        if self._owner is not None and self._read_owner() == self._owner:
            self._owner_path.unlink()
        self._owner = None
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None

    def _own(self, error: OSError) -> str | None:
        """Takes the lock without flock; if another process has it, what is known of that process."""
        if (obstacle := self._displace()) is not None:
            return obstacle
        owner = _describe_this_process()
        try:
            with self._owner_path.open("x", encoding="utf-8") as file:
                self._owner = owner
                file.write(json.dumps(owner))
        except FileExistsError:
            return _IN_USE
        except OSError:
            self._owner_path.unlink(missing_ok=True)
            raise
        print(
            f"{self.path.parent}: its file system has no locks ({reason_of(error)}). {self._owner_path.name} keeps "
            "other runs out.",
            flush=True,
        )
        return None

    def _displace(self) -> str | None:
        """Removes what a process of this host has left; if the file may be in use, what is known of its process.

        Several processes may find the same remains. Whoever creates the claim may remove them, and looks again first.
        """
        owner = self._read_owner()
        if owner is None:
            return None
        if not _is_gone(owner):
            return self._tell(owner)
        claim = self._owner_path.with_name(f"{self._owner_path.name}.{owner['pid']}")
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return f"another process is about to use it, or {claim} was left behind: remove that if there is none"
        try:
            if self._read_owner() == owner:
                self._owner_path.unlink()
        finally:
            claim.unlink()
        return None

    def _read_owner(self) -> dict[str, Any] | None:
        """The content of the lock's file; None if there is none."""
        with suppress(FileNotFoundError):
            try:
                owner = json.loads(self._owner_path.read_text(encoding="utf-8"))
                return owner if isinstance(owner, dict) else {}
            except ValueError:
                return {}
        return None

    def _tell(self, owner: dict[str, Any]) -> str:
        process = f"process {owner.get('pid', '?')} of host {owner.get('host', '?')}"
        return (
            f"{process} has been using it since {owner.get('since', '?')}, as {self._owner_path} says. If that process "
            "is gone, remove that file"
        )


def _describe_this_process() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _machine() -> str | None:
    """Names the processes that see each other's process numbers: those of one boot of one machine, in one container."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return None


def _start_of(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None if there is no such process."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    return None


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether it is certain that the process has ended."""
    machine, pid = _machine(), owner.get("pid")
    if machine is None or owner.get("machine") != machine or type(pid) is not int:
        return False
    return _start_of(pid) != owner.get("started")


class Locks(ExitStack):
    """Folders that this process has for itself. Its locks go with it, however it ends."""

    def __init__(self) -> None:
        super().__init__()
        self._folders: set[str] = set()

    def holds(self, folder: Path) -> bool:
        """Whether it has this folder."""
        return os.path.realpath(folder) in self._folders

    def take(self, folder: Path, what: str) -> Self:
        """Takes a folder that is there, unless it has it; waits a minute for a run that is about to end.

        Args:
            what: the flag and its value, for the error.

        Raises:
            RunDirectoryError: if another run has it.
            OSError: if it has no lock yet and can't be written.
        """
        if self.holds(folder):
            return self
        lock = FileLock(folder / LOCK)
        deadline = time.monotonic() + _SECONDS
        told = False
        while (obstacle := lock.take()) is not None:
            if time.monotonic() > deadline:
                raise RunDirectoryError(f"{what}: {obstacle}. Choose another folder, or end that run.")
            if not told:
                print(f"{folder}: {obstacle}. Waiting for up to a minute.", flush=True)
                told = True
            time.sleep(0.2)
        self._folders.add(os.path.realpath(folder))
        self.callback(lock.release)
        return self
