"""Some rows of a data set as arrays.

Shapes: B rows, I integer features, N ids in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlrm.schema.criteo import NUM_INTEGER_FEATURES


@dataclass
class Rows:
    """Rows of a split as arrays: dense_BI float32, ids integers, labels_B.

    Ids are one array [B, N], feature by feature, or one array [B, hotness] for each feature.
    """

    dense_BI: npt.NDArray[np.float32]
    ids: tuple[npt.NDArray[np.integer], ...]
    labels_B: npt.NDArray[np.integer]

    @staticmethod
    def empty(num_rows: int, widths: Sequence[int]) -> "Rows":
        """Rows to be filled in. `widths`: columns of each array of ids."""
        return Rows(
            np.empty((num_rows, NUM_INTEGER_FEATURES), np.float32),
            tuple(np.empty((num_rows, width), np.int32) for width in widths),
            np.empty(num_rows, np.int32),
        )

    @property
    def ids_BN(self) -> npt.NDArray[np.integer]:
        """All ids side by side."""
        return self.ids[0] if len(self.ids) == 1 else np.concatenate(self.ids, axis=1)

    def take(self, order: npt.NDArray[np.intp] | slice) -> "Rows":
        """Some of the rows, or all, in the given order."""
        return Rows(self.dense_BI[order], tuple(ids[order] for ids in self.ids), self.labels_B[order])
