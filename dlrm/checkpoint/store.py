"""Where checkpoints are, a local folder or any address that fsspec knows, and how one is written. No torch here.

A checkpoint is complete or absent, whenever the processes that write it are killed:

    call                     by       what it does
    begin(name, token)       rank 0   makes a folder under a name that is not yet a checkpoint's
    create(rank_{r}.bin)     ranks    each rank writes the tensors that it saves, and counts bytes and SHA-256
    create(config.json, ..)  rank 0   copies of the run's small files
    create(manifest.json)    rank 0   last: it names all other files, with their sizes and digests
    finish(written, name)    rank 0   gives the folder its name

In a `LocalStore` files are written and synced under a hidden name, `.step_0000001200.{token}.partial`, and the rename
in `finish` completes the checkpoint. A `RemoteStore` has no rename: files are written under their final name, each
appears there whole, and manifest.json completes the checkpoint. `remove` goes the other way: it first renames the
folder, or removes manifest.json. `leftovers` finds what killed processes have left, and the next run removes it.

A name is free if no entry of the store has it (`manifest.name_of`). The token belongs to one start of a run: what a
process of an earlier start still writes while it dies goes to another hidden folder.
"""

import errno
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dlrm.checkpoint.manifest import MANIFEST, File, step_of
from dlrm.errors import CheckpointError, DlrmError, reason_of
from dlrm.system.files import sync

_PARTIAL = ".partial"
_PIECE_BYTES = 1 << 22


class Hashed:
    """A file that is being written, with its size and SHA-256 so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: Any) -> None:
        """Writes bytes, in pieces that stay in the processor's cache between the digest and the copy."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            self._digest.update(piece)
            self._file.write(piece)
        self.num_bytes += len(view)

    @property
    def facts(self) -> File:
        """Size and SHA-256 of what was written."""
        return File(self.num_bytes, self._digest.hexdigest())


class Store(Protocol):
    """Checkpoints by name. A folder without manifest.json is not a checkpoint."""

    address: str

    def names(self) -> list[str]:
        """Names of all entries, links and files included; empty if the store does not exist yet."""
        ...

    def check_writable(self) -> None:
        """Writes something and removes it again.

        Raises:
            OSError: if the store can't be written.
        """
        ...

    def begin(self, name: str, token: str) -> str:
        """Makes a folder for a checkpoint; returns the name under which its files are written until `finish`."""
        ...

    def create(self, name: str, file: str) -> Any:
        """Opens a new file, as a context manager that gives a `Hashed`. At its end the file is on disk."""
        ...

    def finish(self, written: str, name: str) -> None:
        """Completes a checkpoint: all of its files are written, and it gets its name."""
        ...

    def open(self, name: str, file: str) -> BufferedIOBase:
        """Opens a file of a checkpoint."""
        ...

    def remove(self, name: str) -> None:
        """Removes a folder with its content. It stops being a checkpoint at once, whatever happens to the rest."""
        ...

    def leftovers(self) -> list[str]:
        """Names of what interrupted saves have left."""
        ...


def size_of(store: Store, name: str, file: str) -> int:
    """The size of a checkpoint's file in bytes.

    Raises:
        OSError: if the file is missing.
    """
    with store.open(name, file) as opened:
        return opened.seek(0, os.SEEK_END)


def names_in(store: Store) -> list[str]:
    """`store.names()`, with errors that say what can't be listed.

    Raises:
        CheckpointError: if the store can't be listed.
    """
    try:
        return store.names()
    except NotImplementedError:  # as some of fsspec's file systems raise
        raise CheckpointError(f"{store.address}: no address at which a folder can be listed") from None
    except OSError as error:
        raise CheckpointError(f"{store.address}: {reason_of(error)}") from None


def open_store(address: str) -> "Store":
    """The store at a local path, or at an address such as s3://bucket/folder.

    Raises:
        CheckpointError: if there is no such kind of address, or its package is not installed.
    """
    if "://" not in address:
        return LocalStore(address, Path(address))
    try:
        files, root = fsspec.core.url_to_fs(address)
    except Exception as error:  # noqa: BLE001 - each kind of address has error types of its own
        raise CheckpointError(f"{address}: {' '.join(str(error).split())}") from None
    return LocalStore(address, Path(root)) if isinstance(files, LocalFileSystem) else RemoteStore(address, files, root)


class LocalStore:
    """A local folder: a rename completes a checkpoint."""

    def __init__(self, address: str, root: Path) -> None:
        self.address = address
        self.root = root

    def names(self) -> list[str]:
        """See `Store`."""
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in self.root.iterdir())

    def check_writable(self) -> None:
        """See `Store`."""
        folder = self.root.absolute()
        while not os.path.lexists(folder):
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass

    def begin(self, name: str, token: str) -> str:
        """See `Store`."""
        written = f".{name}.{token}{_PARTIAL}"
        make_folder(self.root)
        (self.root / written).mkdir()
        return written

    @contextmanager
    def create(self, name: str, file: str) -> Iterator[Hashed]:
        """See `Store`."""
        with (self.root / name / file).open("xb") as opened:
            yield Hashed(opened)
            opened.flush()
            os.fsync(opened.fileno())

    def finish(self, written: str, name: str) -> None:
        """See `Store`."""
        sync(self.root / written)
        (self.root / written).rename(self.root / name)
        sync(self.root)

    def open(self, name: str, file: str) -> BufferedIOBase:
        """See `Store`. A link is not followed, as it may lead to what is not a checkpoint's.

        Raises:
            OSError: if there is no such file in that folder.
        """
        folder, path = self.root / name, self.root / name / file
        if folder.is_symlink():
            raise OSError(errno.ELOOP, "lies behind a link, which is not followed", str(path))
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.ELOOP, "is a link, or no file", str(path))
        return path.open("rb")

    def remove(self, name: str) -> None:
        """See `Store`. The folder is renamed first."""
        path = self.root / name
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
            if name.startswith(".step_")
            and name.endswith(_PARTIAL)
            and stat.S_ISDIR((self.root / name).lstat().st_mode)
        ]


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, and syncs their names to disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


class RemoteStore:
    """A folder at an fsspec address: manifest.json completes a checkpoint."""

    def __init__(self, address: str, files: Any, root: str) -> None:
        """A store.

        Args:
            files: fsspec's file system for the address.
            root: the folder's path there.
        """
        self.address = address
        self._files = files
        self._root = root.rstrip("/")

    def names(self) -> list[str]:
        """See `Store`."""
        self._files.invalidate_cache()
        with _as_os_error(), suppress(FileNotFoundError):
            entries = self._files.ls(self._root, detail=True)
            return sorted(Path(entry["name"]).name for entry in entries if entry["type"] == "directory")
        return []

    def check_writable(self) -> None:
        """See `Store`."""
        path = f"{self._root}/.writable-{secrets.token_hex(4)}"
        with _as_os_error():
            try:
                self._files.pipe_file(path, b"")
            except FileNotFoundError:  # unlike object stores, some file systems need the folder first
                self._files.makedirs(self._root, exist_ok=True)
                self._files.pipe_file(path, b"")
            self._files.rm(path)

    def begin(self, name: str, token: str) -> str:
        """See `Store`."""
        del token
        with _as_os_error():
            self._files.makedirs(f"{self._root}/{name}", exist_ok=True)
        return name

    @contextmanager
    def create(self, name: str, file: str) -> Iterator[Hashed]:
        """See `Store`."""
        with _as_os_error(), self._files.open(f"{self._root}/{name}/{file}", "wb") as opened:
            yield Hashed(opened)

    def finish(self, written: str, name: str) -> None:
        """See `Store`."""

    def open(self, name: str, file: str) -> BufferedIOBase:
        """See `Store`."""
        with _as_os_error():
            return self._files.open(f"{self._root}/{name}/{file}", "rb")

    def remove(self, name: str) -> None:
        """See `Store`. The manifest goes first."""
        with _as_os_error():
            with suppress(FileNotFoundError):
                self._files.rm(f"{self._root}/{name}/{MANIFEST}")
            self._files.rm(f"{self._root}/{name}", recursive=True)

    def leftovers(self) -> list[str]:
        """See `Store`."""
        with _as_os_error():
            return [
                name
                for name in self.names()
                if step_of(name) is not None and not self._files.exists(f"{self._root}/{name}/{MANIFEST}")
            ]


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Raises OSError for any error of the many libraries behind fsspec."""
    try:
        yield
    except (OSError, DlrmError, NotImplementedError):
        raise
    except Exception as error:  # each library has error types of its own
        raise OSError(errno.EIO, f"{type(error).__name__}: {' '.join(str(error).split())}") from error
