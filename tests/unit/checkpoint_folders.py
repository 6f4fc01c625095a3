"""Checkpoints as other shardings would have written them, made without torch."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.checkpoint.manifest import Chunk, File, Manifest, Tensor, name_of
from dlrm.checkpoint.position import Position
from dlrm.config.config import Config, TrainingConfig

ROWS, DIM = 37, 12
VALIDATION = {
    "auroc": 0.75, "logloss": 0.5, "ne": 0.9, "calibration": 1.25, "num_samples": 1234, "num_positives": 300,
}  # fmt: skip
Places = Mapping[str, Sequence[tuple[int, int, int, int, int]]]
SHARDINGS: dict[str, list[tuple[int, int, int, int, int]]] = {
    "table_wise": [(1, 0, ROWS, 0, DIM)],
    "row_wise": [(0, 0, 13, 0, DIM), (1, 13, 26, 0, DIM), (2, 26, ROWS, 0, DIM)],
    "column_wise": [(2, 0, ROWS, 8, DIM), (0, 0, ROWS, 0, 4), (1, 0, ROWS, 4, 8)],
    "grid_shard": [(0, 0, 20, 0, 8), (1, 20, ROWS, 0, 8), (1, 0, 20, 8, DIM), (0, 20, ROWS, 8, DIM)],
    "a rank without rows": [(0, 0, ROWS, 0, DIM), (1, ROWS, ROWS, 0, DIM)],
}
"""Of each block: its rank, first and last row, first and last column."""


def weights(number: int, dtype: str = "float32") -> np.ndarray:
    """Of table t_cat_{number}: each entry tells its table, row and column."""
    return (number * 1e4 + np.arange(ROWS)[:, None] * 100 + np.arange(DIM)).astype(dtype)


def write_checkpoint(
    folder: Path,
    step: int = 20,
    *,
    blocks: Sequence[tuple[int, int, int, int, int]] = SHARDINGS["table_wise"],
    config: Config | None = None,
    val_auroc: float | None = None,
    lines: Sequence[Mapping[str, Any]] = (),
    environment: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    **facts: Any,
) -> Path:
    """A checkpoint with the tables t_cat_10 and t_cat_2, both cut into `blocks`; `facts` replace the manifest's."""
    path = folder / name_of(step)
    path.mkdir(parents=True)
    files: dict[str, bytearray] = {f"rank_{rank}.bin": bytearray(b"\0" * 64) for rank, *_ in blocks}
    tensors = {}

    def add(name: str, array: np.ndarray, cuts: Sequence[tuple[int, tuple[int, ...], np.ndarray]]) -> None:
        chunks = []
        for rank, offsets, part in cuts:
            file = files[f"rank_{rank}.bin"]
            chunks.append(Chunk(offsets, part.shape, f"rank_{rank}.bin", len(file)))
            file += np.ascontiguousarray(part).tobytes()
        tensors[name] = Tensor(str(array.dtype), array.shape, tuple(chunks))

    for number in (10, 2):
        table = weights(number, dtype)
        cuts = [(rank, (top, left), table[top:end, left:right]) for rank, top, end, left, right in blocks]
        add(f"tables.t_cat_{number}.weight", table, cuts)
        add(f"tables.t_cat_{number}.sum", table[:, 0], [(blocks[0][0], (0,), table[:, 0])])
    for name, array in {
        "dense.over_arch.weight": np.ones((3, 4), np.float32),
        "dense.over_arch.weight.sum": np.ones((3, 4), np.float32),
        "dense.over_arch.bias": np.ones(4, np.float32),
        "random.cpu.rank_0": np.zeros(16, np.uint8),
    }.items():
        add(name, array, [(blocks[0][0], (0,) * array.ndim, array)])
    documents = {
        "config.json": json.dumps((config or Config(training=TrainingConfig(seed=0))).to_json()),
        "environment.json": json.dumps(environment or {}),
        "plan.json": json.dumps({"tables": []}),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
    }
    everything = {**files, **{name: text.encode() for name, text in documents.items()}}
    for name, content in everything.items():
        (path / name).write_bytes(content)
    validations = (VALIDATION,) if val_auroc is not None else ()
    position = Position(step, 0, step, step * 16, step * 16, step, validations=validations, train_seconds=2.5)
    content: dict[str, Any] = {
        "step": step,
        "created": "2026-11-23T10:00:00+0000",
        "world_size": len(files),
        "val_auroc": val_auroc,
        "position": position.to_json(),
        "data": "ab" * 32,
        "files": {
            name: File(len(content), hashlib.sha256(content).hexdigest()) for name, content in everything.items()
        },
        "tensors": tensors,
    }
    (path / "manifest.json").write_bytes(Manifest(**{**content, **facts}).to_bytes())
    return path
