"""The checkpoint that a command is to read. No torch here."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dlrm.checkpoint.find import RemovedError, checkpoint_names, locate, read_manifest
from dlrm.checkpoint.manifest import Manifest, step_of
from dlrm.checkpoint.store import Store
from dlrm.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class Picked:
    """A checkpoint whose manifest is sound."""

    store: Store
    name: str
    manifest: Manifest

    @property
    def address(self) -> str:
        """Of its folder."""
        return f"{self.store.address}/{self.name}"

    @property
    def num_bytes(self) -> int:
        """Of its files, but for the manifest."""
        return sum(file.num_bytes for file in self.manifest.files.values())


def open_address(address: str) -> tuple[Store, str | None]:
    """What an address means, as `locate` says, once it can mean something.

    Raises:
        CheckpointError: if nothing is there, or a link to a checkpoint.
    """
    if "://" in address:
        return locate(address)
    path = Path(address)
    if not address or not path.exists():
        raise CheckpointError(f"{address!r}: no such folder. Expected a run directory, or a checkpoint (step_...).")
    if path.name in ("", ".."):
        path = Path(os.path.abspath(path))  # noqa: PTH100 - `resolve` would follow links
    if not path.is_dir():
        raise CheckpointError(f"{address}: is a file. Expected a run directory, or a checkpoint (step_...).")
    target = path.resolve()
    if path.is_symlink() and step_of(target.name) is not None:
        raise CheckpointError(f"{address}: is a link, which is not followed. Give the checkpoint itself: {target}")
    return locate(str(path))


def pick(address: str, note: Callable[[str], None]) -> Picked:
    """The checkpoint at an address, or the newest complete one there.

    Args:
        note: told of newer ones that are left out, and why.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    store, given = open_address(address)
    if given is not None:
        try:
            return Picked(store, given, read_manifest(store, given))
        except CheckpointError as error:
            raise CheckpointError(f"{store.address}/{given}: {error}.") from None
    for name in checkpoint_names(store):
        try:
            return Picked(store, name, read_manifest(store, name))
        except RemovedError:
            return pick(address, note)  # there are newer ones by now
        except CheckpointError as error:
            note(f"Left out {store.address}/{name}: {error}.")
    raise CheckpointError(f"{address}: no checkpoint there is complete.")


def read_newest(address: str, note: Callable[[str], None], read: Callable[[Picked], T]) -> T:
    """What `read` makes of the checkpoint at an address. If a run removes it meanwhile, of the one that is newest then.

    Raises:
        CheckpointError: if there is none, or it is damaged; if it was named, and was removed.
    """
    _, named = open_address(address)
    while True:
        picked = pick(address, note)
        try:
            return read(picked)
        except RemovedError as error:
            if named is not None:
                raise CheckpointError(f"{picked.address}: {error}.") from None
            note(f"{picked.address} was removed while it was read. Taking the newest one.")
