"""A batch, in the form that the model takes.

Shapes: B samples of this rank, I integer features, F categorical features, N ids in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from dlrm.dataset.rows import Rows
from dlrm.loader.partition import Span
from dlrm.schema.criteo import CATEGORICAL_NAMES

INDEX_PER_KEY: Final = {name: position for position, name in enumerate(CATEGORICAL_NAMES)}


@dataclass
class Batch(Pipelineable):
    """One rank's samples of one step.

    The first `span.rows` samples are real. At most one more is padding without ids, so that batches have the same size
    on all ranks.

    Attributes:
        dense_BI: float32.
        sparse_features: ids of all features, one key for each.
        labels_B: float32, 0 or 1.
        span: rows of the split that the samples are.
    """

    dense_BI: torch.Tensor
    sparse_features: KeyedJaggedTensor
    labels_B: torch.Tensor
    span: Span

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The batch on `device`."""
        return Batch(
            self.dense_BI.to(device=device, non_blocking=non_blocking),
            self.sparse_features.to(device=device, non_blocking=non_blocking),
            self.labels_B.to(device=device, non_blocking=non_blocking),
            self.span,
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the allocator from reusing the memory before `stream` is done with it."""
        self.dense_BI.record_stream(stream)  # type: ignore[arg-type]
        self.sparse_features.record_stream(stream)  # type: ignore[arg-type]
        self.labels_B.record_stream(stream)  # type: ignore[arg-type]

    def pin_memory(self) -> "Batch":
        """A copy of the batch in page-locked memory."""
        return Batch(
            self.dense_BI.pin_memory(),
            self.sparse_features.pin_memory(),
            self.labels_B.pin_memory(),
            self.span,
        )


@dataclass(frozen=True)
class _Jagged:
    """The parts of a KeyedJaggedTensor that depend only on sizes."""

    lengths: torch.Tensor
    offsets: torch.Tensor
    length_per_key: list[int]
    offset_per_key: list[int]


@lru_cache(maxsize=8)
def _jagged(hotness: tuple[int, ...], num_rows: int, padded_rows: int, pinned: bool) -> _Jagged:
    lengths_FB = torch.tensor(hotness, dtype=torch.int32)[:, None].repeat(1, padded_rows)
    lengths_FB[:, num_rows:] = 0
    lengths = lengths_FB.flatten()
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=offsets[1:])
    length_per_key = [size * num_rows for size in hotness]
    offset_per_key = [0, *np.cumsum(length_per_key).tolist()]
    if pinned:
        lengths, offsets = lengths.pin_memory(), offsets.pin_memory()
    return _Jagged(lengths, offsets, length_per_key, offset_per_key)


def build_batch(rows: Rows, span: Span, hotness: Sequence[int], *, pinned: bool = False) -> Batch:
    """Turns rows into tensors. Ids are ordered feature by feature, as TorchRec's input all-to-all needs them.

    Args:
        rows: this rank's own rows.
        span: what the rows are; `span.padded_rows` is B.
        hotness: ids per sample of each feature.
        pinned: whether the batch goes into page-locked memory.
    """
    padding = span.padded_rows - span.rows
    jagged = _jagged(tuple(hotness), span.rows, span.padded_rows, pinned)
    if len(rows.ids) == 1 and rows.ids[0].shape[1] == len(hotness):  # one id per feature: a transpose
        values = np.ascontiguousarray(rows.ids[0].T).reshape(-1)
    else:
        features = rows.ids if len(rows.ids) > 1 else np.split(rows.ids[0], np.cumsum(hotness)[:-1], axis=1)
        values = np.concatenate([ids_BH.reshape(-1) for ids_BH in features])
    dense_BI = torch.from_numpy(np.ascontiguousarray(rows.dense_BI))
    labels_B = torch.from_numpy(rows.labels_B.astype(np.float32))
    if padding:
        dense_BI = torch.nn.functional.pad(dense_BI, (0, 0, 0, padding))
        labels_B = torch.nn.functional.pad(labels_B, (0, padding))
    batch = Batch(
        dense_BI,
        KeyedJaggedTensor(
            keys=list(CATEGORICAL_NAMES),
            values=torch.from_numpy(values),
            lengths=jagged.lengths,
            offsets=jagged.offsets,
            stride=span.padded_rows,
            length_per_key=jagged.length_per_key,
            offset_per_key=jagged.offset_per_key,
            index_per_key=INDEX_PER_KEY,
        ),
        labels_B,
        span,
    )
    return batch.pin_memory() if pinned else batch  # tensors that are pinned already are not copied
