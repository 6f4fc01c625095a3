"""A checkpoint's tensors back into a model, whatever its world size and sharding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint import CheckpointException, load

from dlrm.checkpoint.find import (
    UnfinishedError,
    check_files,
    checkpoint_names,
    locate,
    read_file,
    read_manifest,
)
from dlrm.checkpoint.manifest import Manifest
from dlrm.checkpoint.state import RANDOM, State
from dlrm.checkpoint.storage import Reader, RestorePlanner
from dlrm.checkpoint.store import Store, open_store
from dlrm.config import Config
from dlrm.errors import CheckpointError, ConfigError
from dlrm.runtime import Runtime, on_every_rank, on_main_rank


class MisfitError(CheckpointError):
    """A sound checkpoint of another training."""


@dataclass(frozen=True)
class Source:
    """A sound checkpoint, and the config that wrote it."""

    store: str
    name: str
    manifest: Manifest
    config: Config

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
        note: told on rank 0 of what is left out, and why, unless nothing is taken.

    Raises:
        MisfitError: if all that is sound there is of another training.
        CheckpointError: if all that is there is damaged, or the store can't be listed.
    """
    left_out: list[tuple[str, CheckpointError]] = []
    source = None
    for name in on_main_rank(runtime, lambda: checkpoint_names(open_store(address))):
        try:
            source = _open(address, name, runtime, check)
            break
        except CheckpointError as error:
            left_out.append((name, error))
    if source is None:
        _refuse_to_begin_again(address, left_out)
    if runtime.is_main:
        for name, error in left_out:
            note(f"Left out {address}/{name}: {error}.")
    return source


def _refuse_to_begin_again(address: str, left_out: Sequence[tuple[str, CheckpointError]]) -> None:
    """Names the newest that was finished and still isn't taken, one of another training before one that is damaged."""
    finished = [(name, error) for name, error in left_out if not isinstance(error, UnfinishedError)]
    misfits = [(name, error) for name, error in finished if isinstance(error, MisfitError)]
    if misfits:
        name, error = misfits[0]
        raise _everywhere(MisfitError(f"{address}/{name}: {error}."))
    if finished:
        name, error = finished[0]
        advice = "To start anew, choose other folders."
        raise _everywhere(CheckpointError(f"{address}: no checkpoint there is sound. {name}: {error}. {advice}"))


def find_given(address: str, runtime: Runtime, check: Check, note: Callable[[str], None]) -> Source:
    """The checkpoint at an address, or the newest sound one there. Collective.

    Raises:
        CheckpointError: if there is none, or it is damaged, or of another training.
    """

    def find() -> tuple[str, str | None]:
        store, name = locate(address)
        return store.address, name

    store, name = on_main_rank(runtime, find)
    if name is not None:
        try:
            return _open(store, name, runtime, check)
        except CheckpointError as error:
            raise _everywhere(type(error)(f"{store}/{name}: {error}.")) from None
    source = find_newest(store, runtime, check, note)
    if source is None:
        raise _everywhere(CheckpointError(f"{address}: no checkpoint there is sound."))
    return source


def _everywhere(error: CheckpointError) -> CheckpointError:
    error.everywhere = True
    return error


def _open(address: str, name: str, runtime: Runtime, check: Check) -> Source:
    def read() -> Source:
        store = open_store(address)
        manifest = read_manifest(store, name)
        check_files(store, name, manifest, ["config.json"])
        text = read_file(store, name, "config.json")
        try:
            config = Config.from_text(text.decode())
        except (ValueError, ConfigError) as error:
            raise CheckpointError(f"its config.json can't be read ({error})") from None
        check(manifest, config)
        return Source(address, name, manifest, config)

    source = on_main_rank(runtime, read)
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
        rank, (cause, _) = min(error.failures.items())
        raise _everywhere(CheckpointError(f"{source.address} (rank {rank}): {cause}")) from None
    return wanted
