"""Keeps two runs out of one folder."""

import fcntl
import os
import time
from contextlib import ExitStack
from pathlib import Path

from typing_extensions import Self

from dlrm.errors import RunDirectoryError

LOCK = ".lock"
_SECONDS = 60.0


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
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        deadline = time.monotonic() + _SECONDS
        told = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(handle)
                    raise RunDirectoryError(
                        f"{what}: another run is using it. Choose another folder, or end that run."
                    ) from None
                if not told:
                    print(f"{folder}: another run is using it. Waiting for up to a minute.", flush=True)
                    told = True
                time.sleep(0.2)
            else:
                self._folders.add(os.path.realpath(folder))
                self.callback(os.close, handle)
                return self
