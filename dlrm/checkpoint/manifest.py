"""What a checkpoint says of itself: manifest.json, the last of its files to be written. No torch here.

A checkpoint is a folder `step_0000001200`, or `step_0000001200-1` where that step had been saved before. It has the
bytes of its tensors in `rank_{r}.bin`, and config.json, plan.json, environment.json and metrics.jsonl as they were.
Tensors are plain little-endian arrays in row-major order: reading one runs no code from the file.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dlrm.errors import CheckpointError

CHECKPOINT_VERSION = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{10})(-\d)?")
_FILE_NAME = re.compile(r"[A-Za-z0-9_]+\.[a-z]+")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
_MOST = 2**63
_DTYPES = ("float32", "float64", "int64", "uint8")


def name_of(step: int, taken: Container[str] = ()) -> str:
    """Folder for the checkpoint of a training step: a step is saved again if it was validated since, or went wrong.

    Raises:
        CheckpointError: if it has been saved ten times.
    """
    name = f"step_{step:010d}"
    for candidate in (name, *(f"{name}-{number}" for number in range(1, 10))):
        if candidate not in taken:
            return candidate
    raise CheckpointError(f"{name} has been saved ten times: remove what can't be used")


def step_of(name: str) -> int | None:
    """The step that a folder's name stands for; None if it is no checkpoint's."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class File:
    """Size and digest of one file of a checkpoint."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor: where it lies in the tensor, and from which byte of which file on."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int


@dataclass(frozen=True)
class Tensor:
    """A tensor as its chunks, which do not overlap and leave nothing out."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise CheckpointError(f"a tensor has the dtype {self.dtype!r}, expected one of {', '.join(_DTYPES)}")

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint.

    Attributes:
        position: where training stands, see `dlrm.checkpoint.position`.
        data: digests of the files that were trained on; None for random data.
        val_auroc: of the validation at this very step, if there was one.
    """

    step: int
    created: str
    world_size: int
    val_auroc: float | None
    position: Mapping[str, Any]
    data: str | None
    files: Mapping[str, File]
    tensors: Mapping[str, Tensor]

    def to_bytes(self) -> bytes:
        """What manifest.json holds; its digest is of all else in it."""
        content = {"checkpoint_version": CHECKPOINT_VERSION, **asdict(self)}
        return (json.dumps({**content, "sha256": _digest(content)}, allow_nan=False) + "\n").encode()

    @staticmethod
    def from_bytes(text: bytes) -> "Manifest":
        """The manifest that `to_bytes` wrote.

        Raises:
            CheckpointError: if it is damaged, of another version, or points outside its folder.
        """
        try:
            content = json.loads(text)
            version = content.pop("checkpoint_version")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise CheckpointError("manifest.json is damaged") from None
        if version != CHECKPOINT_VERSION:
            raise CheckpointError(f"checkpoint_version {version!r}, and this dlrm reads {CHECKPOINT_VERSION}")
        try:
            digest = content.pop("sha256")
            if digest != _digest({"checkpoint_version": version, **content}):
                raise CheckpointError("manifest.json is damaged: its digest differs")
            files = {name: File(**file) for name, file in content.pop("files").items()}
            tensors = {name: _read_tensor(tensor) for name, tensor in content.pop("tensors").items()}
            manifest = Manifest(files=files, tensors=tensors, **content)
            _check(manifest)
            if manifest.to_bytes() != text:  # the digest is of what the text says, not of how it says it
                raise CheckpointError("manifest.json is damaged: its text was changed")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(f"manifest.json is damaged: {error}") from None
        return manifest


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_tensor(content: Mapping[str, Any]) -> Tensor:
    chunks = tuple(
        Chunk(tuple(chunk["offsets"]), tuple(chunk["shape"]), chunk["file"], chunk["start"])
        for chunk in content["chunks"]
    )
    return Tensor(content["dtype"], tuple(content["shape"]), chunks)


def _check(manifest: Manifest) -> None:
    """Refuses what is no count, names that leave the folder, and chunks that leave their file or are not the tensor.

    Raises:
        CheckpointError: if there is one.
    """
    _check_counts("step and world_size", (manifest.step, manifest.world_size))
    if type(manifest.created) is not str or type(manifest.data) not in (str, type(None)):
        raise CheckpointError("manifest.json is damaged: created and data must be text")
    if type(manifest.val_auroc) not in (float, int, type(None)) or not 0 <= (manifest.val_auroc or 0) <= 1:
        raise CheckpointError("manifest.json is damaged: val_auroc must be a number from 0 to 1")
    for name, file in manifest.files.items():
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"manifest.json names a file {name[:80]!r}")
        _check_counts(name, (file.num_bytes,))
    for name, tensor in manifest.tensors.items():
        if not _TENSOR_NAME.fullmatch(name):
            raise CheckpointError(f"manifest.json names a tensor {name[:80]!r}")
        _check_counts(name, (*tensor.shape, math.prod(tensor.shape)))
        for chunk in tensor.chunks:
            _check_counts(f"a chunk of {name}", (*chunk.offsets, *chunk.shape, chunk.start))
            file = manifest.files.get(chunk.file)
            stop = chunk.start + math.prod(chunk.shape) * np.dtype(tensor.dtype).itemsize
            if file is None or stop > file.num_bytes or {len(chunk.offsets), len(chunk.shape)} != {len(tensor.shape)}:
                raise CheckpointError(f"a chunk of {name} lies outside its file or tensor")
        blocks = [(chunk.offsets, chunk.shape) for chunk in tensor.chunks if math.prod(chunk.shape)]
        if not _tile(blocks, tensor.shape):
            raise CheckpointError(f"the chunks of {name} overlap, or do not make up all of it")


def _check_counts(what: str, numbers: Iterable[Any]) -> None:
    if not all(type(number) is int and 0 <= number < _MOST for number in numbers):
        raise CheckpointError(f"manifest.json is damaged: {what} must be whole numbers from 0 to 2^63")


def _tile(blocks: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...]) -> bool:
    """Whether blocks (offsets, shape) make up a tensor: strips along the last dimension, each of such strips."""
    if not shape or not blocks:
        return len(blocks) == (math.prod(shape) > 0)
    strips = defaultdict(list)
    for offsets, sizes in blocks:
        strips[offsets[-1], sizes[-1]].append((offsets[:-1], sizes[:-1]))
    stop = 0
    for (start, length), strip in sorted(strips.items()):
        if start != stop or not _tile(strip, shape[:-1]):
            return False
        stop += length
    return stop == shape[-1]
