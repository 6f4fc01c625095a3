"""A checkpoint found and read by all ranks of a training, whatever its world size and sharding."""

from collections.abc import Callable

from torch.distributed.checkpoint import CheckpointException, load

from dlrm.checkpoint.checkpoint import Checkpoint, RemovedError
from dlrm.checkpoint.dcp import Reader, RestorePlanner
from dlrm.checkpoint.find import Location, find
from dlrm.checkpoint.manifest import Manifest
from dlrm.checkpoint.tensors import RANDOM, State
from dlrm.config.config import Config
from dlrm.errors import CheckpointError
from dlrm.ranks.runtime import Runtime, on_every_rank, on_main_rank

Check = Callable[[Manifest, Config], None]
"""Raises MisfitError for a checkpoint of another training."""


def find_on_ranks(location: Location, runtime: Runtime, check: Check, note: Callable[[str], None]) -> Checkpoint:
    """As `find`, and every byte of the checkpoint is verified. Collective.

    Rank 0 reads manifests; the files of a checkpoint are divided among the ranks. One that turns out to be damaged is
    left out, and the search starts again.

    Args:
        note: called on rank 0 for each newer one that is left out, with the reason.

    Raises:
        CheckpointError: as `find` does, on every rank.
    """
    unsound: dict[str, CheckpointError] = {}
    notes: list[str] = []

    def search() -> Checkpoint:
        notes.clear()
        # Reading the config here has it sent to the other ranks with the checkpoint.
        return find(location, notes.append, lambda found: check(found.manifest, found.config), unsound)

    while True:
        checkpoint = on_main_rank(runtime, search)
        try:
            _verify(checkpoint, runtime)
        except CheckpointError as error:
            unsound[checkpoint.name] = error
        else:
            for text in notes:
                note(text)
            return checkpoint


def _verify(checkpoint: Checkpoint, runtime: Runtime) -> None:
    own = sorted(checkpoint.manifest.files)[runtime.rank :: runtime.world_size]
    on_every_rank(runtime, lambda: checkpoint.verify(own))


def restore(checkpoint: Checkpoint, state: State, runtime: Runtime) -> State:
    """Fills the tensors of `state` from a checkpoint; returns those that were filled. Collective.

    The state of a random number generator is filled if the checkpoint has it for this rank.

    Raises:
        CheckpointError: if a tensor is missing, of another shape or type, or can't be read.
    """
    saved = checkpoint.manifest.tensors
    wanted = {name: parts for name, parts in state.items() if name in saved or not name.startswith(RANDOM)}

    def check() -> None:
        for name, parts in wanted.items():
            tensor = saved.get(name)
            if tensor is None:
                raise CheckpointError(f"{checkpoint.address}: holds no {name}")
            if tensor.shape != tuple(parts.shape) or f"torch.{tensor.dtype}" != str(parts.dtype):
                raise CheckpointError(
                    f"{checkpoint.address}: {name} is {tensor.dtype} {list(tensor.shape)}, expected "
                    f"{str(parts.dtype).removeprefix('torch.')} {list(parts.shape)}"
                )

    on_every_rank(runtime, check)
    try:
        load(
            dict(wanted),
            storage_reader=Reader(checkpoint),
            planner=RestorePlanner(),
            process_group=runtime.control_group,
        )
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, RemovedError):
                raise RemovedError(f"{checkpoint.address}: {cause}.").raised_everywhere() from None
        rank, (cause, _) = min(error.failures.items())
        raise CheckpointError(f"{checkpoint.address} (rank {rank}): {cause}").raised_everywhere() from None
    return wanted
