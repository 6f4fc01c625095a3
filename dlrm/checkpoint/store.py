"""Where checkpoints lie: a local folder, or any address that fsspec knows. No torch here."""

import errno
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dlrm.artifacts import sync
from dlrm.checkpoint.manifest import MANIFEST, File, step_of
from dlrm.errors import CheckpointError

_PARTIAL = ".partial"
_PIECE_BYTES = 1 << 22


class Hashed:
    """A file being written, with its size and digest so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: Any) -> None:
        """Takes bytes; in pieces that stay in a cache between the digest and the copy."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            self._digest.update(piece)
            self._file.write(piece)
        self.num_bytes += len(view)

    @property
    def facts(self) -> File:
        """Of what was written."""
        return File(self.num_bytes, self._digest.hexdigest())


class Store(Protocol):
    """Checkpoints by name. A checkpoint without manifest.json is none."""

    address: str

    def names(self) -> list[str]:
        """Of the folders there, links included; none where nothing is there yet."""
        ...

    def check_writable(self) -> None:
        """Finds out whether it can be written, and leaves nothing behind.

        Raises:
            OSError: if it can't.
        """
        ...

    def begin(self, name: str, token: str) -> str:
        """Makes room for a checkpoint; gives the name under which its files are written until `finish`."""
        ...

    def create(self, name: str, file: str) -> Any:
        """Opens a new file, as a context that gives `Hashed`; on leaving it the file is on disk."""
        ...

    def finish(self, written: str, name: str) -> None:
        """Gives what was written its name. All files are there."""
        ...

    def open(self, name: str, file: str) -> BinaryIO:
        """Opens a file of a checkpoint."""
        ...

    def remove(self, name: str) -> None:
        """Removes a folder and what is in it."""
        ...

    def leftovers(self) -> list[str]:
        """What savings that did not finish have left."""
        ...


def open_store(address: str) -> "Store":
    """The store at a local path, or at an address such as s3://bucket/folder.

    Raises:
        CheckpointError: if there is no such kind of address, or its package is not installed.
    """
    if "://" not in address:
        return LocalStore(address, Path(address))
    try:
        files, root = fsspec.core.url_to_fs(address)
    except (ValueError, ImportError, OSError) as error:
        raise CheckpointError(f"{address}: {' '.join(str(error).split())}") from None
    return LocalStore(address, Path(root)) if isinstance(files, LocalFileSystem) else RemoteStore(address, files, root)


class LocalStore:
    """A folder. A checkpoint is written under another name, synced, and renamed."""

    def __init__(self, address: str, root: Path) -> None:
        self.address = address
        self._root = root

    def names(self) -> list[str]:
        """See `Store`."""
        if not self._root.is_dir():
            return []
        return sorted(entry.name for entry in os.scandir(self._root) if entry.is_symlink() or entry.is_dir())

    def check_writable(self) -> None:
        """See `Store`."""
        folder = self._root.absolute()
        while not os.path.lexists(folder):
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass

    def begin(self, name: str, token: str) -> str:
        """See `Store`."""
        written = f".{name}.{token}{_PARTIAL}"
        (self._root / written).mkdir(parents=True)
        return written

    @contextmanager
    def create(self, name: str, file: str) -> Iterator[Hashed]:
        """See `Store`."""
        with (self._root / name / file).open("xb") as opened:
            yield Hashed(opened)
            opened.flush()
            os.fsync(opened.fileno())

    def finish(self, written: str, name: str) -> None:
        """See `Store`."""
        sync(self._root / written)
        (self._root / written).rename(self._root / name)
        sync(self._root)

    def open(self, name: str, file: str) -> BinaryIO:
        """See `Store`. A link is not followed: it may lead anywhere, and what it points to is not ours.

        Raises:
            OSError: if it is not a file in that folder.
        """
        folder, path = self._root / name, self._root / name / file
        if folder.is_symlink():
            raise OSError(errno.ELOOP, "lies behind a link, which is not followed", str(path))
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.ELOOP, "is a link, or no file", str(path))
        return path.open("rb")

    def remove(self, name: str) -> None:
        """See `Store`. It stops being a checkpoint at once, whatever happens to the rest."""
        path = self._root / name
        if path.is_symlink():
            raise OSError(errno.ELOOP, "is a link", str(path))
        if not name.endswith(_PARTIAL):
            doomed = path.with_name(f".{name}.removed{_PARTIAL}")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            path = doomed
        shutil.rmtree(path)

    def leftovers(self) -> list[str]:
        """See `Store`."""
        return [
            name
            for name in self.names()
            if name.startswith(".step_") and name.endswith(_PARTIAL) and not (self._root / name).is_symlink()
        ]


class RemoteStore:
    """A folder at an fsspec address. Nothing is renamed there: manifest.json, written last, is what completes it."""

    def __init__(self, address: str, files: Any, root: str) -> None:
        """Makes one.

        Args:
            files: fsspec's file system of that address.
            root: the folder's name there.
        """
        self.address = address
        self._files = files
        self._root = root.rstrip("/")

    def names(self) -> list[str]:
        """See `Store`."""
        self._files.invalidate_cache()
        with suppress(FileNotFoundError):
            entries = self._files.ls(self._root, detail=True)
            return sorted(Path(entry["name"]).name for entry in entries if entry["type"] == "directory")
        return []

    def check_writable(self) -> None:
        """See `Store`."""
        path = f"{self._root}/.writable-{secrets.token_hex(4)}"
        self._files.pipe_file(path, b"")
        self._files.rm(path)

    def begin(self, name: str, token: str) -> str:
        """See `Store`."""
        del token
        self._files.makedirs(f"{self._root}/{name}", exist_ok=True)
        return name

    @contextmanager
    def create(self, name: str, file: str) -> Iterator[Hashed]:
        """See `Store`."""
        with self._files.open(f"{self._root}/{name}/{file}", "wb") as opened:
            yield Hashed(opened)

    def finish(self, written: str, name: str) -> None:
        """See `Store`."""

    def open(self, name: str, file: str) -> BinaryIO:
        """See `Store`."""
        return self._files.open(f"{self._root}/{name}/{file}", "rb")

    def remove(self, name: str) -> None:
        """See `Store`. The manifest goes first."""
        with suppress(FileNotFoundError):
            self._files.rm(f"{self._root}/{name}/{MANIFEST}")
        self._files.rm(f"{self._root}/{name}", recursive=True)

    def leftovers(self) -> list[str]:
        """See `Store`."""
        return [
            name
            for name in self.names()
            if step_of(name) is not None and not self._files.exists(f"{self._root}/{name}/{MANIFEST}")
        ]
