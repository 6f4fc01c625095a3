"""Finds checkpoints and says which are sound. No torch here."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dlrm.checkpoint.manifest import MANIFEST, Manifest, step_of
from dlrm.checkpoint.store import Store, open_store
from dlrm.config.config import Config
from dlrm.errors import CheckpointError, ConfigError, reason_of

_READ_BYTES = 1 << 22
_FOLDER = "checkpoints"


class UnfinishedError(CheckpointError):
    """A checkpoint whose writing was cut short: there is nothing in it to miss."""


class RemovedError(CheckpointError):
    """A checkpoint that was there and is not: the run that wrote it keeps its newest ones alone."""


def locate(address: str) -> tuple[Store, str | None]:
    """What an address means: a checkpoint, or a run directory or folder of checkpoints, whose newest is wanted.

    Raises:
        CheckpointError: if nothing is there, or it can't be listed.
    """
    parent, _, name = address.rstrip("/").rpartition("/")
    if step_of(name) is not None:
        store = open_store(parent or ("/" if address.startswith("/") else "."))
        if name not in _list(store):
            raise CheckpointError(f"{address}: no such checkpoint folder. Expected one that a run has written.")
        return store, name
    store = open_store(address)
    if _FOLDER in _list(store):
        store = open_store(f"{address.rstrip('/')}/{_FOLDER}")
    elif (elsewhere := _checkpoint_dir_of(address)) is not None:
        store = open_store(elsewhere)
    if not checkpoint_names(store):
        raise CheckpointError(f"{address}: holds no checkpoint. Expected a run directory, or a folder step_...")
    return store, None


def _checkpoint_dir_of(address: str) -> str | None:
    """Where the run of a run directory has its checkpoints, if its --checkpoint_dir was given."""
    try:
        return Config.load(Path(address, "config.json")).checkpoint.checkpoint_dir
    except (OSError, ValueError, ConfigError):
        return None


def checkpoint_names(store: Store) -> list[str]:
    """Of what looks like a checkpoint, newest first.

    Raises:
        CheckpointError: if the store can't be listed.
    """
    return sorted((name for name in _list(store) if step_of(name) is not None), reverse=True)


def _list(store: Store) -> list[str]:
    try:
        return store.names()
    except NotImplementedError:  # as some of fsspec's say
        raise CheckpointError(f"{store.address}: no address at which a folder can be listed") from None
    except OSError as error:
        raise CheckpointError(f"{store.address}: {reason_of(error)}") from None


def read_manifest(store: Store, name: str) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        UnfinishedError: if it has none.
        CheckpointError: if it is damaged, or of another version.
    """
    manifest = Manifest.from_bytes(read_file(store, name, MANIFEST))
    if step_of(name) != manifest.step:
        raise CheckpointError(f"manifest.json is that of step {manifest.step}: the folder was renamed")
    return manifest


def read_file(store: Store, name: str, file: str) -> bytes:
    """A small file of a checkpoint.

    Raises:
        CheckpointError: if it is not there or can't be read.
    """
    try:
        with store.open(name, file) as opened:
            return opened.read()
    except FileNotFoundError:
        check_is_there(store, name)
        if file == MANIFEST:
            raise UnfinishedError(f"{file} is missing: it was not finished") from None
        raise CheckpointError(f"{file} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{file}: {reason_of(error)}") from None


def check_is_there(store: Store, name: str) -> None:
    """Tells a checkpoint that lacks a file from one that was removed while it was read.

    Raises:
        RemovedError: if it was removed.
    """
    if name not in _list(store):
        raise RemovedError(
            "the checkpoint was removed while it was read. A run keeps its newest ones (--keep): give the run "
            "directory, or a copy"
        )


def read_config(store: Store, name: str, manifest: Manifest) -> Config:
    """The config that a checkpoint was written with.

    Raises:
        CheckpointError: if it is not there, damaged, or of another version.
    """
    check_files(store, name, manifest, ["config.json"])
    try:
        config = Config.from_text(read_file(store, name, "config.json").decode())
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"its config.json can't be read ({error})") from None
    if config.training.seed is None:
        raise CheckpointError("its config.json has no seed")
    return config


def check_files(
    store: Store,
    name: str,
    manifest: Manifest,
    files: Iterable[str],
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Reads some files of a checkpoint and compares their digests.

    Args:
        advance: told of bytes that were read.

    Raises:
        CheckpointError: at one that is missing, truncated or changed.
    """
    buffer = memoryview(bytearray(_READ_BYTES))
    for file in files:
        expected = manifest.files.get(file)
        if expected is None:
            raise CheckpointError(f"manifest.json does not name {file}")
        digest, num_bytes = hashlib.sha256(), 0
        try:
            with store.open(name, file) as opened:
                while count := opened.readinto(buffer):  # fresh memory for each piece would take as long as its digest
                    digest.update(buffer[:count])
                    num_bytes += count
                    advance(count)
        except OSError as error:
            check_is_there(store, name)
            raise CheckpointError(f"{file}: {reason_of(error)}") from None
        if num_bytes != expected.num_bytes:
            raise CheckpointError(f"{file} has {num_bytes:,} bytes, expected {expected.num_bytes:,}")
        if digest.hexdigest() != expected.sha256:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not the manifest's")


def complete_checkpoints(store: Store) -> list[tuple[str, Manifest]]:
    """Checkpoints whose manifest is sound, newest first."""
    found = []
    for name in checkpoint_names(store):
        try:
            found.append((name, read_manifest(store, name)))
        except CheckpointError:
            continue
    return found


def best_of(checkpoints: Sequence[tuple[str, Manifest]]) -> str | None:
    """The one with the best validation AUROC; the older of two that are equal."""
    scored = [(manifest.val_auroc, -manifest.step, name) for name, manifest in checkpoints if manifest.val_auroc]
    return max(scored)[2] if scored else None
