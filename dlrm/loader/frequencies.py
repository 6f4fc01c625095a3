"""Counts how often each id is trained on.

Shapes: B samples, H hotness of a feature.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from dlrm.loader.batch import Batch
from dlrm.ranks.runtime import Runtime
from dlrm.schema.criteo import CATEGORICAL_NAMES

BYTES_PER_TABLE_ROW = 16
"""Memory of the two counts of an id."""


class IdFrequencies:
    """This rank's counts: for each feature, int64 [rows] of first ids (`before`) and of all ids (`after`).

    A sample's first id of a feature is the one in the log; its companions follow.
    """

    def __init__(self, table_rows: Sequence[int], hotness: Sequence[int]) -> None:
        self._hotness = tuple(hotness)
        self._before = [np.zeros(rows, np.int64) for rows in table_rows]
        self._after = [np.zeros(rows, np.int64) for rows in table_rows]

    def count(self, batch: Batch) -> None:
        """Counts the ids of a batch that was trained on."""
        values, rows = batch.sparse_features.values().cpu().numpy(), batch.span.rows
        first = 0
        for before, after, hot in zip(self._before, self._after, self._hotness, strict=True):
            ids_BH = values[first : first + rows * hot].reshape(rows, hot)
            np.add.at(before, ids_BH[:, 0], 1)
            np.add.at(after, ids_BH.reshape(-1), 1)
            first += ids_BH.size

    def add(self, counts: Mapping[str, npt.NDArray[np.int64]]) -> None:
        """Adds counts of an earlier part of the run, in the form that `total` returns."""
        for name, before, after in zip(CATEGORICAL_NAMES, self._before, self._after, strict=True):
            before += counts[f"before_{name}"]
            after += counts[f"after_{name}"]

    def total(self, runtime: Runtime) -> dict[str, npt.NDArray[np.int64]]:
        """Sums over all ranks, named `before_cat_0`, `after_cat_0`, `before_cat_1`, ... Collective.

        Only rank 0 gets the sums. What other ranks get is meaningless.
        """
        arrays = {}
        for name, before, after in zip(CATEGORICAL_NAMES, self._before, self._after, strict=True):
            for when, counts in (("before", before), ("after", after)):
                total = counts.copy()
                if runtime.world_size > 1:
                    dist.reduce(torch.from_numpy(total), dst=0, group=runtime.control_group)
                arrays[f"{when}_{name}"] = total
        return arrays
