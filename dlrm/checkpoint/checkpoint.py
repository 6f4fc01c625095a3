"""One checkpoint: its manifest, its files, and whether they are sound. No torch here."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dlrm.checkpoint import run_files
from dlrm.checkpoint.manifest import MANIFEST, Manifest, step_of
from dlrm.checkpoint.store import Store, names_in, open_store
from dlrm.config.config import Config
from dlrm.errors import CheckpointError, ConfigError, reason_of

_READ_BYTES = 1 << 22


class UnfinishedError(CheckpointError):
    """A checkpoint, or a folder of them, in which nothing was ever finished: nothing is lost."""


class RemovedError(CheckpointError):
    """A checkpoint that was removed while it was read: the run that wrote it keeps only its newest ones."""


@contextmanager
def naming(address: str) -> Iterator[None]:
    """Puts a checkpoint's address in front of what is wrong with it. The error keeps its type."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f"{address}: {error}.") from None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest is sound; its other files are checked by `verify`.

    What its methods raise does not name the checkpoint: see `naming`.

    Attributes:
        store_address: the store that it is in; an address and not a `Store`, so that ranks can send a checkpoint.
        name: its folder there.
    """

    store_address: str
    name: str
    manifest: Manifest

    @property
    def store(self) -> Store:
        """The store that it is in."""
        return open_store(self.store_address)

    @property
    def address(self) -> str:
        """The address of its folder."""
        return f"{self.store_address}/{self.name}"

    @property
    def num_bytes(self) -> int:
        """Bytes of its files, without the manifest."""
        return sum(file.num_bytes for file in self.manifest.files.values())

    @cached_property
    def config(self) -> Config:
        """The config that it was written with, from its config.json. Once read, it is sent along to other ranks.

        Raises:
            CheckpointError: if the file is missing, damaged, or of another version.
        """
        self.verify([run_files.CONFIG])
        try:
            config = Config.from_text(self.read(run_files.CONFIG).decode())
        except (ValueError, ConfigError) as error:
            raise CheckpointError(f"its config.json can't be read ({error})") from None
        if config.training.seed is None:
            raise CheckpointError("its config.json has no seed")
        return config

    def read(self, file: str) -> bytes:
        """All bytes of a small file.

        Raises:
            CheckpointError: if it is missing or can't be read.
        """
        return _read(self.store, self.name, file)

    def read_environment(self) -> dict[str, Any]:
        """The content of its environment.json.

        Raises:
            CheckpointError: if the file is missing or can't be read.
            ValueError: if it is not JSON.
        """
        return json.loads(self.read(run_files.ENVIRONMENT))

    def verify(self, files: Iterable[str], advance: Callable[[int], None] = lambda _: None) -> None:
        """Reads files and compares their sizes and SHA-256 with the manifest's.

        Args:
            advance: called with the number of bytes of each piece that was read.

        Raises:
            CheckpointError: if a file is missing, truncated or changed.
        """
        for file in files:
            expected = self.manifest.files.get(file)
            if expected is None:
                raise CheckpointError(f"{MANIFEST} does not name {file}")
            digest, num_bytes = self._digest(file, advance)
            if num_bytes != expected.num_bytes:
                raise CheckpointError(f"{file} has {num_bytes:,} bytes, expected {expected.num_bytes:,}")
            if digest != expected.sha256:
                raise CheckpointError(f"{file} is damaged: its SHA-256 is not the manifest's")

    def _digest(self, file: str, advance: Callable[[int], None]) -> tuple[str, int]:
        """SHA-256, in hexadecimal, and size of a file."""
        digest, num_bytes = hashlib.sha256(), 0
        buffer = memoryview(bytearray(_READ_BYTES))
        try:
            with self.store.open(self.name, file) as opened:
                while count := opened.readinto(buffer):  # fresh memory for each piece would take as long as its digest
                    digest.update(buffer[:count])
                    num_bytes += count
                    advance(count)
        except OSError as error:
            self.check_is_there()
            raise CheckpointError(f"{file}: {reason_of(error)}") from None
        return digest.hexdigest(), num_bytes

    def check_is_there(self) -> None:
        """Called if a file can't be read: tells a checkpoint that lacks a file from one that was removed.

        Raises:
            RemovedError: if it was removed.
        """
        _check_is_there(self.store, self.name)


def read_checkpoint(store: Store, name: str) -> Checkpoint:
    """A checkpoint, from its manifest. None of its other files is looked at.

    Raises:
        UnfinishedError: if it has no manifest.
        CheckpointError: if the manifest is damaged, or of another version.
    """
    manifest = Manifest.from_bytes(_read(store, name, MANIFEST))
    if step_of(name) != manifest.step:
        raise CheckpointError(f"manifest.json is that of step {manifest.step}: the folder was renamed")
    return Checkpoint(store.address, name, manifest)


def _read(store: Store, name: str, file: str) -> bytes:
    try:
        with store.open(name, file) as opened:
            return opened.read()
    except FileNotFoundError:
        _check_is_there(store, name)
        if file == MANIFEST:
            raise UnfinishedError(f"{file} is missing: it was not finished") from None
        raise CheckpointError(f"{file} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{file}: {reason_of(error)}") from None


def _check_is_there(store: Store, name: str) -> None:
    if name not in names_in(store):
        raise RemovedError(
            "the checkpoint was removed while it was read. A run keeps its newest ones (--keep): give the run "
            "directory, or a copy"
        )
