"""A checkpoint's tensors back into a model, whatever its world size and sharding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch.distributed.checkpoint import CheckpointException, load

from dlrm.checkpoint.dcp import Reader, RestorePlanner
from dlrm.checkpoint.find import (
    RemovedError,
    UnfinishedError,
    check_files,
    checkpoint_names,
    read_config,
    read_manifest,
)
from dlrm.checkpoint.manifest import Manifest
from dlrm.checkpoint.pick import open_address
from dlrm.checkpoint.store import Store, open_store
from dlrm.checkpoint.tensors import RANDOM, State
from dlrm.config.config import Config
from dlrm.errors import CheckpointError, MisfitError
from dlrm.ranks.runtime import Runtime, on_every_rank, on_main_rank


@dataclass(frozen=True)
class Source:
    """A sound checkpoint, and the config that wrote it. `left_out` names others there that could not be taken."""

    store: str
    name: str
    manifest: Manifest
    config: Config
    left_out: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """Of its folder."""
        return f"{self.store}/{self.name}"

    def open(self) -> Store:
        """The store that it is in."""
        return open_store(self.store)


Check = Callable[[Manifest, Config], None]
"""Raises MisfitError for a checkpoint of another training."""


def find_newest(address: str, runtime: Runtime, check: Check, note: Callable[[str], None]) -> Source | None:
    """The newest sound checkpoint of a store; None if none was ever finished there. Collective.

    Args:
        note: told on rank 0 of what is left out, and why.

    Raises:
        MisfitError: if all that is sound there is of another training.
        CheckpointError: if all that is there is damaged, or the store can't be listed.
    """
    left_out: list[tuple[str, CheckpointError]] = []
    names = on_main_rank(runtime, lambda: checkpoint_names(open_store(address)))
    for name in names:
        try:
            source = _open(address, name, runtime, check)
        except RemovedError:
            return find_newest(address, runtime, check, note)  # there are newer ones by now
        except CheckpointError as error:
            left_out.append((name, error))
        else:
            break
    else:
        _refuse_to_begin_again(address, left_out)
        return None
    if runtime.is_main:
        for name, error in left_out:
            note(f"Left out {address}/{name}: {error}.")
    older = names[len(left_out) + 1 :]
    foreign = on_main_rank(runtime, lambda: [name for name in older if not _fits(address, name, check)])
    return replace(source, left_out=(*(name for name, _ in left_out), *foreign))


def _fits(address: str, name: str, check: Check) -> bool:
    try:
        _read(address, name, check)
    except CheckpointError:
        return False
    return True


def _refuse_to_begin_again(address: str, left_out: Sequence[tuple[str, CheckpointError]]) -> None:
    """Names those that were finished and still are not taken; of those of another training, the newest alone."""
    finished = [(name, error) for name, error in left_out if not isinstance(error, UnfinishedError)]
    misfits = [(name, error) for name, error in finished if isinstance(error, MisfitError)]
    if misfits:
        name, error = misfits[0]
        raise MisfitError(f"{address}/{name}: {error}.").raised_everywhere()
    if finished:
        reasons = " ".join(f"{name}: {error}." for name, error in finished)
        advice = "To start anew, choose other folders."
        raise CheckpointError(f"{address}: no checkpoint there is sound. {reasons} {advice}").raised_everywhere()


def find_given(address: str, runtime: Runtime, check: Check, note: Callable[[str], None]) -> Source:
    """The checkpoint at an address, or the newest sound one there. Collective.

    Raises:
        CheckpointError: if there is none, or it is damaged, or of another training.
    """

    def find() -> tuple[str, str | None]:
        store, name = open_address(address)
        return store.address, name

    store, name = on_main_rank(runtime, find)
    if name is not None:
        try:
            return _open(store, name, runtime, check)
        except CheckpointError as error:
            raise type(error)(f"{store}/{name}: {error}.").raised_everywhere() from None
    source = find_newest(store, runtime, check, note)
    if source is None:
        raise CheckpointError(f"{address}: no checkpoint there is sound.").raised_everywhere()
    return source


def _read(address: str, name: str, check: Check) -> Source:
    """A checkpoint whose tensors nobody has looked at yet."""
    store = open_store(address)
    manifest = read_manifest(store, name)
    config = read_config(store, name, manifest)
    check(manifest, config)
    return Source(address, name, manifest, config)


def _open(address: str, name: str, runtime: Runtime, check: Check) -> Source:
    source = on_main_rank(runtime, lambda: _read(address, name, check))
    files = sorted(source.manifest.files)[runtime.rank :: runtime.world_size]
    on_every_rank(runtime, lambda: check_files(source.open(), name, source.manifest, files))
    return source


def restore(source: Source, state: State, runtime: Runtime) -> State:
    """Fills the tensors of `state` from a checkpoint; gives those that were filled. Collective.

    Generators of random numbers are filled where the checkpoint has this rank's.

    Raises:
        CheckpointError: if a tensor is missing, of another shape or type, or can't be read.
    """
    saved = source.manifest.tensors
    wanted = {name: parts for name, parts in state.items() if name in saved or not name.startswith(RANDOM)}

    def check() -> None:
        for name, parts in wanted.items():
            tensor = saved.get(name)
            if tensor is None:
                raise CheckpointError(f"{source.address}: holds no {name}")
            if tensor.shape != tuple(parts.shape) or f"torch.{tensor.dtype}" != str(parts.dtype):
                raise CheckpointError(
                    f"{source.address}: {name} is {tensor.dtype} {list(tensor.shape)}, expected "
                    f"{str(parts.dtype).removeprefix('torch.')} {list(parts.shape)}"
                )

    on_every_rank(runtime, check)
    try:
        load(
            dict(wanted),
            storage_reader=Reader(source.open(), source.name, source.manifest),
            planner=RestorePlanner(),
            process_group=runtime.control_group,
        )
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, RemovedError):
                raise RemovedError(f"{source.address}: {cause}.").raised_everywhere() from None
        rank, (cause, _) = min(error.failures.items())
        raise CheckpointError(f"{source.address} (rank {rank}): {cause}").raised_everywhere() from None
    return wanted
