"""Which checkpoint is meant: the one that an address names, or the newest sound one there. No torch here.

    address  --locate-->  Location  --find-->  Checkpoint

`restore.find_on_ranks` does the same with all ranks of a training, which also verify every file.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from dlrm.checkpoint import run_files
from dlrm.checkpoint.checkpoint import Checkpoint, RemovedError, UnfinishedError, naming, read_checkpoint
from dlrm.checkpoint.manifest import step_of
from dlrm.checkpoint.store import Store, names_in, open_store
from dlrm.config.config import Config
from dlrm.errors import CheckpointError, ConfigError, MisfitError

T = TypeVar("T")


class Location(NamedTuple):
    """A checkpoint of a store; without a name, the newest sound one there."""

    store_address: str
    name: str | None = None


def locate(address: str) -> Location:
    """What an address means: a checkpoint, or the newest one of a run directory or of a folder of checkpoints.

    Raises:
        CheckpointError: if nothing is there, if it can't be listed, or if it is a link to a checkpoint.
    """
    if "://" not in address:
        address = _check_path(address)
    parent, _, name = address.rstrip("/").rpartition("/")
    if step_of(name) is None:
        return Location(_store_of(address).address)
    store = open_store(parent or ("/" if address.startswith("/") else "."))
    if name not in names_in(store):
        raise CheckpointError(f"{address}: no such checkpoint folder. Expected one that a run has written.")
    return Location(store.address, name)


def _check_path(address: str) -> str:
    """A local path, with a name at its end, that is a folder and not a link to a checkpoint."""
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
    return str(path)


def _store_of(address: str) -> Store:
    """The store of a run directory's checkpoints, or of a folder of checkpoints."""
    store = open_store(address)
    if run_files.CHECKPOINTS in names_in(store):
        store = open_store(f"{address.rstrip('/')}/{run_files.CHECKPOINTS}")
    elif (elsewhere := _checkpoint_dir_of(address)) is not None:
        store = open_store(elsewhere)
    if not checkpoint_names(store):
        raise CheckpointError(f"{address}: holds no checkpoint. Expected a run directory, or a folder step_...")
    return store


def _checkpoint_dir_of(address: str) -> str | None:
    """--checkpoint_dir of the run in a run directory, if it was given."""
    try:
        return Config.load(Path(address, run_files.CONFIG)).checkpoint.checkpoint_dir
    except (OSError, ValueError, ConfigError):
        return None


def find(
    location: Location,
    note: Callable[[str], None],
    check: Callable[[Checkpoint], None] = lambda _: None,
    unsound: Mapping[str, CheckpointError] | None = None,
) -> Checkpoint:
    """The checkpoint that is named, or the newest one with a sound manifest that passes `check`.

    Args:
        note: called for each newer one that is left out, with the reason.
        check: raises CheckpointError if a checkpoint must not be taken.
        unsound: by name, checkpoints that are known to be damaged.

    Raises:
        UnfinishedError: if none was ever finished there.
        MisfitError: if `check` raised it for the named one, or for the newest if none can be taken.
        CheckpointError: if the named one is damaged, if all are, or if the store can't be listed.
    """

    def take(name: str) -> Checkpoint:
        if unsound is not None and name in unsound:
            raise unsound[name]
        checkpoint = read_checkpoint(store, name)
        check(checkpoint)
        return checkpoint

    store = open_store(location.store_address)
    if location.name is not None:
        with naming(f"{store.address}/{location.name}"):
            return take(location.name)
    left_out: dict[str, CheckpointError] = {}
    for name in checkpoint_names(store):
        try:
            checkpoint = take(name)
        except RemovedError:
            return find(location, note, check, unsound)  # a run that trains has written newer ones
        except CheckpointError as error:
            left_out[name] = error
            continue
        for newer, error in left_out.items():
            note(f"Left out {store.address}/{newer}: {error}.")
        return checkpoint
    raise _none_to_take(store.address, left_out)


def _none_to_take(address: str, left_out: Mapping[str, CheckpointError]) -> CheckpointError:
    """Names those that were finished and can't be taken; of those of another training, only the newest."""
    finished = {name: error for name, error in left_out.items() if not isinstance(error, UnfinishedError)}
    for name, error in finished.items():
        if isinstance(error, MisfitError):
            return MisfitError(f"{address}/{name}: {error}.")
    reasons = " ".join(f"{name}: {error}." for name, error in (finished or left_out).items()) or "None is there."
    advice = "Choose another checkpoint; to start a new training, choose other folders."
    kind = CheckpointError if finished else UnfinishedError
    return kind(f"{address}: no checkpoint there is sound. {reasons} {advice}")


def read_newest(address: str, note: Callable[[str], None], read: Callable[[Checkpoint], T]) -> T:
    """What `read` makes of the checkpoint at an address. If a run removes it meanwhile, the newest one is read instead.

    Args:
        note: called for each checkpoint that is left out or was removed.

    Raises:
        CheckpointError: naming the checkpoint, if there is none, if it is damaged, or if it was named and removed.
    """
    location = locate(address)
    while True:
        checkpoint = find(location, note)
        try:
            with naming(checkpoint.address):
                return read(checkpoint)
        except RemovedError:
            if location.name is not None:
                raise
            note(f"{checkpoint.address} was removed while it was read. Taking the newest one.")


def names_to_leave(own: Checkpoint, check: Callable[[Checkpoint], None]) -> tuple[str, ...]:
    """Checkpoints beside a run's newest sound one that are not this run's to count or to remove, newest first.

    Newer ones are damaged or of another training, else one of them would have been taken; older ones are left if they
    do not pass `check`.
    """

    def passes(name: str) -> bool:
        try:
            check(read_checkpoint(own.store, name))
        except CheckpointError:
            return False
        return True

    names = [name for name in checkpoint_names(own.store) if name != own.name]
    return tuple(name for name in names if name > own.name or not passes(name))


def checkpoint_names(store: Store) -> list[str]:
    """Names of all that looks like a checkpoint, newest first.

    Raises:
        CheckpointError: if the store can't be listed.
    """
    return sorted((name for name in names_in(store) if step_of(name) is not None), reverse=True)


def complete_checkpoints(store: Store) -> list[Checkpoint]:
    """Checkpoints whose manifest is sound, newest first.

    Raises:
        CheckpointError: if the store can't be listed.
    """
    found = []
    for name in checkpoint_names(store):
        try:
            found.append(read_checkpoint(store, name))
        except CheckpointError:
            continue
    return found


def best_of(checkpoints: Sequence[Checkpoint]) -> str | None:
    """The name of the one with the best validation AUROC; of equal ones the oldest. None if none was validated."""
    scored = [found for found in checkpoints if found.manifest.val_auroc]
    if not scored:
        return None
    return max(scored, key=lambda found: (found.manifest.val_auroc or 0.0, -found.manifest.step, found.name)).name
