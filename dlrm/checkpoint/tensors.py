"""A training's tensors. Names and shapes depend neither on how tables are sharded nor on which kernel updates them.

    tables.{table}.weight                      [rows, dim]
    tables.{table}.sum, .exp_avg, .exp_avg_sq  the optimizer's state of a table
    dense.{parameter}, dense.{parameter}.{state}
    counts.{when}_{feature}                    how often each id occurred
    random.{device}.rank_{r}                   the state of a rank's random number generator

Shapes: R rows of a table.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from dlrm.errors import CheckpointError
from dlrm.ranks.runtime import Runtime

COUNTS = "counts."
RANDOM = "random."
_TABLES = ".embedding_bags."
_MOMENTS = {"momentum1": "sum"}
"""TorchRec's name for Adagrad's state of fused tables, and torch's."""


@dataclass(frozen=True)
class Part:
    """A block of a tensor that this rank holds; it starts at `offsets` in the whole tensor."""

    offsets: tuple[int, ...]
    tensor: torch.Tensor


@dataclass(frozen=True)
class Parts:
    """The blocks of a tensor that this rank holds, perhaps none. DCP plans with it as it does with sharded tensors.

    Attributes:
        shape: of the whole tensor, over all ranks.
        owner: the rank that saves the tensor, if all ranks hold the same; None if each rank saves its own blocks.
    """

    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[Part, ...]
    owner: int | None = None

    def size(self) -> torch.Size:
        """The shape of the whole tensor, as DCP asks for it."""
        return self.shape

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Parts":
        """The same blocks, with `change` applied to each tensor."""
        return replace(self, parts=tuple(Part(part.offsets, change(part.tensor)) for part in self.parts))

    def cut(self, shape: Sequence[int]) -> "Parts":
        """The first rows, as a tensor of `shape`."""
        parts = (Part(part.offsets, part.tensor[: shape[0] - part.offsets[0]]) for part in self.parts if part.offsets)
        kept = tuple(part for part in parts if part.offsets[0] < shape[0])
        return replace(self, shape=torch.Size(shape), parts=kept)

    def saved_by(self, rank: int) -> "Parts":
        """The blocks that `rank` saves."""
        return self if self.owner in (None, rank) else replace(self, parts=())

    def part_at(self, index: MetadataIndex) -> torch.Tensor:
        """The block that DCP asks for."""
        return next(part.tensor for part in self.parts if torch.Size(part.offsets) == index.offset)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """For DCP: what is to be loaded."""
        return [ChunkStorageMetadata(torch.Size(part.offsets), part.tensor.size()) for part in self.parts]

    def __create_write_items__(self, name: str, parts: Any) -> list[WriteItem]:
        """For DCP: what is to be saved."""
        del parts
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]


State = dict[str, Parts]


def model_state(model: DistributedModelParallel, world_size: int) -> State:
    """Weights and buffers, as views: what is written to them is written to the model. Collective."""
    state = {}
    for name, weight in model.state_dict().items():
        table = table_of(name)
        key = f"tables.{table}.weight" if table else f"dense.{_strip(name)}"
        state[key] = _parts_of(weight, _owner(key, world_size))
    return state


def optimizer_state(optimizer: CombinedOptimizer, world_size: int) -> State:
    """The optimizers' state of each weight, as views. Collective."""
    state = {}
    states = cast(dict[str, dict[str, Any]], optimizer.state_dict()["state"])
    for name, values in states.items():  # ranks have different names
        table = table_of(name)
        prefix = f"tables.{table}" if table else f"dense.{_strip(name)}"
        for key, value in values.items():
            kind = key.removeprefix(f"{table}.")
            if kind != "step" and isinstance(value, torch.Tensor):
                if table and not isinstance(value, ShardedTensor) and value.dim() == 2 and value.size(1) == 1:
                    value = value.view(-1)  # row-wise Adagrad's is [R] where FBGEMM updates, [R, 1] where TorchRec does
                full_name = f"{prefix}.{_MOMENTS.get(kind, kind)}"
                state[full_name] = _parts_of(value, _owner(full_name, world_size))
    return state


def training_state(model: DistributedModelParallel, optimizer: CombinedOptimizer, runtime: Runtime) -> State:
    """All tensors that training changes, as views: what is written to them is written to the model. Collective."""
    return {
        **model_state(model, runtime.world_size),
        **optimizer_state(optimizer, runtime.world_size),
        **_random_states(runtime),
    }


def count_state(counts: Mapping[str, npt.NDArray[np.int64]], runtime: Runtime) -> State:
    """Counts of ids. Rank 0 holds the sums over all ranks, and saves them."""
    state = {}
    for name, array in counts.items():
        tensor = torch.from_numpy(array)
        part = (Part((0,), tensor),) if runtime.is_main else ()
        state[f"{COUNTS}{name}"] = Parts(tensor.size(), tensor.dtype, part)
    return state


def table_of(name: str) -> str | None:
    """The name of the table whose weight a parameter of a model is, sharded or not; None for a dense parameter."""
    return name.split(_TABLES)[1].removesuffix(".weight") if _TABLES in name else None


def _strip(name: str) -> str:
    return name.removeprefix("model.")


def _owner(name: str, world_size: int) -> int:
    """The rank that saves a tensor which all ranks hold. It follows from the name alone, so that all ranks agree."""
    return zlib.crc32(name.encode()) % world_size


def _parts_of(value: torch.Tensor | ShardedTensor, owner: int) -> Parts:
    if isinstance(value, ShardedTensor):
        metadata = value.metadata()
        shards = [Part(tuple(shard.metadata.shard_offsets), shard.tensor.detach()) for shard in value.local_shards()]
        return Parts(torch.Size(metadata.size), metadata.tensor_properties.dtype, tuple(shards))
    tensor = value.detach()
    return Parts(tensor.size(), tensor.dtype, (Part((0,) * tensor.dim(), tensor),), owner)


def _random_states(runtime: Runtime) -> State:
    states = {f"{RANDOM}cpu.rank_{runtime.rank}": torch.get_rng_state()}
    if runtime.device.type == "cuda":
        states[f"{RANDOM}cuda.rank_{runtime.rank}"] = torch.cuda.get_rng_state(runtime.device)
    return {name: Parts(state.size(), state.dtype, (Part((0,), state),)) for name, state in states.items()}


def restore_random_states(state: State, runtime: Runtime) -> None:
    """Sets this rank's random number generators to the states that were loaded.

    Raises:
        CheckpointError: if one is not a generator's state.
    """
    for name, parts in state.items():
        try:
            if name.startswith(f"{RANDOM}cpu."):
                torch.set_rng_state(parts.parts[0].tensor)
            elif name.startswith(f"{RANDOM}cuda."):
                torch.cuda.set_rng_state(parts.parts[0].tensor, runtime.device)
        except RuntimeError as error:
            raise CheckpointError(f"{name} is no generator's state ({error})") from None


def fill_optimizer_states(optimizer: CombinedOptimizer, step: int) -> None:
    """Makes the state that an optimizer would make in its first step, and sets the number of steps it has counted."""
    for _, part in optimizer.optimizers:
        for group in part.param_groups:
            for parameter in group["params"] if step else ():
                state = part.state[parameter]
                if not state and "betas" in group:
                    fused = group.get("fused") or group.get("capturable")
                    state["step"] = torch.zeros((), device=parameter.device if fused else None)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                if "step" in state:
                    state["step"].fill_(step)
    optimizer.set_optimizer_step(step)


def blocks(state: State) -> Iterator[tuple[str, Part]]:
    """Yields this rank's blocks of all tensors, each with the tensor's name."""
    for name, parts in state.items():
        for part in parts.parts:
            yield name, part


def counts_of(state: State) -> dict[str, npt.NDArray[np.int64]]:
    """The counts of ids in a state of rank 0, by the names that `count_state` was given."""
    return {
        name.removeprefix(COUNTS): parts.parts[0].tensor.numpy()
        for name, parts in state.items()
        if name.startswith(COUNTS)
    }
