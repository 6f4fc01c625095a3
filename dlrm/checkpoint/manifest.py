"""manifest.json: what a checkpoint holds, and the digest of each of its files. No torch here.

A checkpoint is a folder `step_0000001200`, or `step_0000001200-1` if that step was saved before. It holds the bytes of
its tensors in `rank_{r}.bin`, and copies of the run's config.json, plan.json, environment.json and metrics.jsonl.
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
    """The folder for the checkpoint of a step. A step is saved again if it was validated since, or if it is damaged.

    Raises:
        CheckpointError: if it has been saved ten times.
    """
    name = f"step_{step:010d}"
    for candidate in (name, *(f"{name}-{number}" for number in range(1, 10))):
        if candidate not in taken:
            return candidate
    raise CheckpointError(f"{name} has been saved ten times: remove what can't be used")


def step_of(name: str) -> int | None:
    """The step in a checkpoint's folder name; None if the name is not a checkpoint's."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class File:
    """Size and SHA-256 of one file of a checkpoint."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor: its place in the tensor, its file, and the byte at which it starts there."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int


@dataclass(frozen=True)
class Tensor:
    """A tensor and its chunks, which cover it without overlap."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise CheckpointError(f"a tensor has the dtype {self.dtype!r}, expected one of {', '.join(_DTYPES)}")

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint.

    Attributes:
        world_size: the number of ranks that wrote it.
        val_auroc: the AUROC of the validation at this step; None if there was none.
        position: where training stands, see `dlrm.checkpoint.position`.
        data: digest of the files that were trained on; None for random data.
        files: size and SHA-256 of each file other than the manifest, by name.
        tensors: all tensors, by name.
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
        """The content of manifest.json. It ends with the digest of everything else in it."""
        content = {"checkpoint_version": CHECKPOINT_VERSION, **asdict(self)}
        return (json.dumps({**content, "sha256": _digest(content)}, allow_nan=False) + "\n").encode()

    @staticmethod
    def from_bytes(text: bytes) -> "Manifest":
        """The manifest in the content of a manifest.json.

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
            if manifest.to_bytes() != text:  # the digest does not cover white space or the form of numbers
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
    """Checks that counts are counts, that names stay in the folder, and that chunks cover their tensor.

    Raises:
        CheckpointError: naming what is wrong.
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
    """Whether blocks (offsets, shape) cover a tensor without overlap.

    Blocks with the same extent in the last dimension form a strip. The strips must follow each other along that
    dimension, and each must cover the other dimensions, by the same rule.
    """
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
