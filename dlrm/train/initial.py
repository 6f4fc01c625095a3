"""The first weights of a new training, from a checkpoint of another one: --init_from."""

import hashlib
from functools import partial

import torch
import torch.distributed as dist

from dlrm.assembly.foundation import Foundation
from dlrm.checkpoint import run_files
from dlrm.checkpoint.checkpoint import Checkpoint
from dlrm.checkpoint.find import locate
from dlrm.checkpoint.manifest import MANIFEST, Manifest
from dlrm.checkpoint.position import Position
from dlrm.checkpoint.restore import find_on_ranks, restore
from dlrm.checkpoint.tensors import State, fill_optimizer_states, model_state, optimizer_state
from dlrm.checkpoint.transfer import Transfer, check_tables
from dlrm.config.config import Config
from dlrm.errors import CheckpointError, MisfitError
from dlrm.ranks.runtime import Runtime, on_main_rank
from dlrm.system.console import plural


def find_initial(config: Config, runtime: Runtime) -> Checkpoint:
    """The checkpoint of --init_from. Collective.

    Raises:
        CheckpointError: if there is none, it is damaged, or the run can't begin with it.
    """
    address = config.checkpoint.init_from
    assert address is not None
    try:
        location = on_main_rank(runtime, lambda: locate(address))
        return find_on_ranks(location, runtime, partial(_check_fit, config), print)
    except CheckpointError as error:
        raise type(error)(f"--init_from: {error}").raised_everywhere() from None


def _check_fit(config: Config, manifest: Manifest, saved: Config) -> None:
    """Refuses tables that have shrunk or have other columns, and the state of another optimizer."""
    check_tables(manifest.tensors, config.model)
    there, here = saved.optimizer.algorithm, config.optimizer.algorithm
    if config.checkpoint.init_optimizer and there != here:
        raise MisfitError(
            f"its optimizer's state is of {there}, and --init_optimizer needs that of {here}. Leave --init_optimizer "
            f"out, or use --optimizer {there}"
        )


def take_weights(foundation: Foundation, source: Checkpoint) -> tuple[Position, list[str]]:
    """Fills a model with those tensors of a checkpoint that fit. Collective.

    Returns:
        Where training begins, and lines that say what was taken, drawn and left.

    Raises:
        CheckpointError: if a tensor can't be read.
    """
    config, runtime = foundation.config, foundation.runtime
    position = Position.from_json(source.manifest.position)
    saved = source.manifest.tensors
    model = model_state(foundation.model, runtime.world_size)
    transfer = Transfer.of(saved, {name: (tuple(p.shape), _name_of(p.dtype)) for name, p in model.items()})
    wanted = {name: model[name] for name in transfer.weights}
    states: State = {}
    start = Position()
    if config.checkpoint.init_optimizer:
        start = Position(optimizer_steps=position.step + position.optimizer_steps)
        fill_optimizer_states(foundation.optimizer, start.optimizer_steps)
        states = {
            name: parts
            for name, parts in optimizer_state(foundation.optimizer, runtime.world_size).items()
            if transfer.takes_state(name, saved, tuple(parts.shape), _name_of(parts.dtype))
        }
    restore(source, {name: parts.cut(saved[name].shape) for name, parts in (wanted | states).items()}, runtime)
    names = _of_all_ranks(set(states), runtime) if config.checkpoint.init_optimizer else None
    written = f"step {position.step:,}, trained on {position.num_samples:,} samples"
    ranks = plural(source.manifest.world_size, "rank")
    return start, [
        f"First weights from {source.address} ({written}, written by {ranks}):",
        *transfer.describe(names, config.optimizer.algorithm),
    ]


def _of_all_ranks(names: set[str], runtime: Runtime) -> set[str]:
    """The names on all ranks together: only the ranks that hold a fused table know of its state."""
    if runtime.world_size == 1:
        return names
    gathered: list[set[str]] = [set()] * runtime.world_size
    dist.all_gather_object(gathered, names, group=runtime.control_group)
    return set().union(*gathered)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe_origin(source: Checkpoint) -> dict[str, str]:
    """What environment.json says of the checkpoint that the first weights are from.

    Raises:
        CheckpointError: if it can't be read.
    """
    return {
        "init_checkpoint": source.address,
        "init_manifest_sha256": hashlib.sha256(source.read(MANIFEST)).hexdigest(),
    }


def read_origin(source: Checkpoint) -> dict[str, str]:
    """What `describe_origin` said when the training of a checkpoint began; empty if it was not begun from another one.

    Raises:
        CheckpointError: if it can't be read.
    """
    if run_files.ENVIRONMENT not in source.manifest.files:
        return {}
    environment = source.read_environment()
    return {name: environment[name] for name in ("init_checkpoint", "init_manifest_sha256") if name in environment}
