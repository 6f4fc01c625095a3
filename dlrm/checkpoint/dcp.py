"""How DCP writes and reads checkpoints: raw bytes and a manifest, no pickle.

torch's own reader unpickles `.metadata`, and with it runs whatever code the file asks for.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any, cast

import numpy as np
import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dlrm.checkpoint import manifest as files
from dlrm.checkpoint.checkpoint import Checkpoint
from dlrm.checkpoint.store import Hashed, Store, size_of
from dlrm.checkpoint.tensors import Parts
from dlrm.errors import CheckpointError

_ALIGNMENT = 64
_BLOCK_BYTES = 32 << 20

Describe = Callable[[Mapping[str, files.File], Mapping[str, files.Tensor]], files.Manifest]


class ShardPlanner(DefaultSavePlanner):
    """Plans which blocks of `Parts` a rank saves."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """The block that a write item stands for."""
        return self.state_dict[index.fqn].part_at(index)


class RestorePlanner(DefaultLoadPlanner):
    """Plans which blocks of `Parts` a rank fills."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: Mapping[str, Parts], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keeps what is to be loaded."""
        self.state_dict = dict(state_dict)
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The block that a read item fills a part of."""
        return self.state_dict[index.fqn].part_at(index)


@dataclass(frozen=True)
class _Place:
    file: str
    start: int
    facts: files.File


class Writer(StorageWriter):
    """Writes one checkpoint, in the order that `dlrm.checkpoint.store` gives.

    DCP calls the methods from top to bottom; in between, ranks wait for each other.
    """

    def __init__(
        self,
        store: Store,
        step: int,
        token: str,
        rank: int,
        documents: Mapping[str, bytes],
        describe: Describe,
        note_written: Callable[[], None],
    ) -> None:
        """A writer.

        Args:
            token: what tells this start of the run from an earlier one, see `dlrm.checkpoint.store`.
            documents: on rank 0, small files by name.
            describe: on rank 0, returns the manifest for files and tensors.
            note_written: called after each block that is written.
        """
        self._store, self._step, self._token, self._rank = store, step, token, rank
        self._documents, self._describe, self._note_written = documents, describe, note_written
        self._name = self._written = ""
        self.num_bytes = 0
        """Bytes that this rank has written; on rank 0, after `finish`, those of the whole checkpoint."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to reset: a writer writes once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Makes the folder, on rank 0, before any rank writes."""
        del args, kwargs
        if is_coordinator:
            self._name = files.name_of(self._step, self._store.names())
            self._written = self._store.begin(self._name, self._token)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Changes nothing."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tells all ranks the folder to write to."""
        return [SavePlan(plan.items, storage_data=self._written, planner_data=plan.planner_data) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's file and syncs it to disk."""
        self._written = plan.storage_data
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write_items(plan, planner) if plan.items else [])
        return done

    def _write_items(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        name, places = f"rank_{self._rank}.bin", []
        with self._store.create(self._written, name) as file:
            for item in plan.items:
                file.write(bytes(-file.num_bytes % _ALIGNMENT))
                start = file.num_bytes
                self._write_tensor(file, cast(torch.Tensor, planner.resolve_data(item)).detach())
                places.append((item.index, start, file.num_bytes - start))
        self.num_bytes = file.num_bytes
        return [WriteResult(index, size, _Place(name, start, file.facts)) for index, start, size in places]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, after all ranks have written: writes the small files and the manifest, and gives the name."""
        written: dict[str, files.File] = {}
        chunks: dict[str, list[files.Chunk]] = defaultdict(list)
        sizes = {
            (name, chunk.offsets): tuple(chunk.sizes)
            for name, tensor in metadata.state_dict_metadata.items()
            for chunk in tensor.chunks  # type: ignore[union-attr] # there is nothing but tensors
        }
        for result in (result for results_of_rank in results for result in results_of_rank):
            place, index = result.storage_data, result.index
            assert index.offset is not None
            written[place.file] = place.facts
            chunk = files.Chunk(tuple(index.offset), sizes[index.fqn, index.offset], place.file, place.start)
            chunks[index.fqn].append(chunk)
        tensors = {
            name: files.Tensor(_name_of(tensor.properties.dtype), tuple(tensor.size), tuple(chunks[name]))  # type: ignore[union-attr]
            for name, tensor in metadata.state_dict_metadata.items()
        }
        for name, facts in written.items():
            self._check_is_here(name, facts)
        for name, document in self._documents.items():
            with self._store.create(self._written, name) as file:
                file.write(document)
            written[name] = file.facts
        with self._store.create(self._written, files.MANIFEST) as file:
            file.write(self._describe(written, tensors).to_bytes())
        self._store.finish(self._written, self._name)
        self.num_bytes = sum(facts.num_bytes for facts in written.values())

    def _check_is_here(self, name: str, facts: files.File) -> None:
        """Checks that rank 0 sees what another rank has written.

        Raises:
            CheckpointError: if it does not.
        """
        try:
            num_bytes = size_of(self._store, self._written, name)
        except OSError:
            num_bytes = None
        if num_bytes != facts.num_bytes:
            raise CheckpointError(
                f"rank 0 does not see {name} of another rank. Give a --checkpoint_dir that all hosts see"
            )

    def _write_tensor(self, file: Hashed, tensor: torch.Tensor) -> None:
        """Writes a tensor block by block, so that a tensor on a GPU is never copied as a whole."""
        rows = tensor if tensor.dim() else tensor.view(1)
        row_bytes = rows[:1].nbytes
        for block in rows.split(max(1, _BLOCK_BYTES // row_bytes)) if row_bytes else ():
            file.write(block.cpu().contiguous().view(-1).numpy())
            self._note_written()

    def discard(self) -> None:
        """Removes the files of a checkpoint that can't be finished."""
        if self._written:
            self._store.remove(self._written)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Not used: the store knows its address."""
        del checkpoint_id
        return True


class Reader(StorageReader):
    """Reads only those parts of each tensor that this rank needs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._chunks = {
            (name, chunk.offsets): (tensor, chunk)
            for name, tensor in checkpoint.manifest.tensors.items()
            for chunk in tensor.chunks
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to reset."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The manifest's tensors, in the form that DCP plans with."""
        del args, kwargs
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=getattr(torch, tensor.dtype)),
                    torch.Size(tensor.shape),
                    [
                        ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape))
                        for chunk in tensor.chunks
                    ],
                )
                for name, tensor in self._checkpoint.manifest.tensors.items()
            },
            storage_meta=StorageMeta(),
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Changes nothing."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Changes nothing."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills the tensors. Each file is read from front to back.

        Raises:
            CheckpointError: if a file is shorter than the manifest says.
        """
        wanted = defaultdict(list)
        for item in plan.items:
            assert item.storage_index.offset is not None
            tensor, chunk = self._chunks[item.storage_index.fqn, tuple(item.storage_index.offset)]
            wanted[chunk.file].append((chunk.start, tensor.dtype, chunk, item))
        for name, reads in wanted.items():
            with self._open(name) as file:
                for _, dtype, chunk, item in sorted(reads, key=lambda read: read[0]):
                    _read_block(file, np.dtype(dtype), chunk, item, planner.resolve_tensor(item).detach())
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _open(self, file: str) -> BufferedIOBase:
        try:
            return self._checkpoint.store.open(self._checkpoint.name, file)
        except FileNotFoundError:
            self._checkpoint.check_is_there()
            raise

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Not used: the store knows its address."""
        del checkpoint_id
        return True


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_block(file: Any, dtype: np.dtype[Any], chunk: files.Chunk, item: ReadItem, target: torch.Tensor) -> None:
    """Reads the rows of a chunk that `item` asks for, some MiB at a time, and copies its columns to `target`.

    Whole rows are read straight into `target` if that is in host memory.
    """
    shape, offsets, lengths = chunk.shape or (1,), item.storage_offsets or (0,), item.lengths or (1,)
    target = target.view(lengths)
    row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
    if row_bytes == 0 or target.numel() == 0:
        return
    columns = tuple(slice(start, start + length) for start, length in zip(offsets[1:], lengths[1:], strict=True))
    is_whole = tuple(lengths[1:]) == tuple(shape[1:]) and _name_of(target.dtype) == dtype.name
    is_direct = is_whole and target.is_contiguous() and target.device.type == "cpu"
    rows_at_once = max(1, _BLOCK_BYTES // row_bytes)
    file.seek(chunk.start + offsets[0] * row_bytes)
    for first in range(0, lengths[0], rows_at_once):
        rows = min(rows_at_once, lengths[0] - first)
        own = target[first : first + rows]
        block = own.numpy() if is_direct else np.empty((rows, *shape[1:]), dtype)
        _fill(file, block, chunk.file)
        if not is_direct:
            own.copy_(torch.from_numpy(block[(slice(None), *columns)]))


def _fill(file: Any, block: np.ndarray[Any, Any], name: str) -> None:
    """Fills an array with bytes from a file.

    Raises:
        CheckpointError: if the file ends too early.
    """
    view = memoryview(block.reshape(-1).view(np.uint8))  # type: ignore[bad-argument-type] # an array is a buffer
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled:])
        if not count:
            raise CheckpointError(f"{name} ends too early")
        filled += count
