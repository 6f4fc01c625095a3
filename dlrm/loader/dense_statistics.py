"""Statistics of the integers that a model is built with: means, deviations, quantiles.

Shapes: S sampled rows, I integer features, E edges.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlrm.schema.criteo import MISSING_DENSE

SAMPLE_ROWS = 1 << 20
_BLOCK_ROWS = 1 << 12
_ABOVE_MISSING = 1e-6


@dataclass(frozen=True)
class DenseStatistics:
    """Statistics of each integer, over the rows in which it is not missing.

    Attributes:
        mean_I: mean.
        deviation_I: standard deviation; 1 if all values are the same.
        edges_IE: edges of buckets, ascending: first a number just above the value for missing, then quantiles. The
            bucket of a value is the number of edges that are not above it; bucket 0 is for missing. If a column has
            fewer distinct quantiles, its last edges are infinite.
    """

    mean_I: npt.NDArray[np.float32]
    deviation_I: npt.NDArray[np.float32]
    edges_IE: npt.NDArray[np.float32]

    @staticmethod
    def of(sample_SI: npt.NDArray[np.float32], buckets: int) -> "DenseStatistics":
        """Statistics of a sample, with edges for `buckets` buckets, and one more for missing."""
        columns = [column[column != MISSING_DENSE].astype(np.float64) for column in sample_SI.T]
        deviations = [column.std() if len(column) else 0.0 for column in columns]
        edges_IE = np.full((len(columns), max(1, buckets)), np.inf, np.float32)
        for edges_E, column in zip(edges_IE, columns, strict=True):
            if len(column):
                shares = np.arange(len(edges_E)) / len(edges_E)
                distinct = np.unique(np.quantile(column, shares, method="higher").astype(np.float32))
                edges_E[: len(distinct)] = distinct
                edges_E[0] = min(distinct[0], _ABOVE_MISSING)  # a value below all of the sample is not missing
        return DenseStatistics(
            np.array([column.mean() if len(column) else 0.0 for column in columns], np.float32),
            np.array([deviation if deviation > 0 else 1.0 for deviation in deviations], np.float32),
            edges_IE,
        )


def sample_rows(
    num_rows: int, read: Callable[[int, int], npt.NDArray[np.float32]], most: int = SAMPLE_ROWS
) -> npt.NDArray[np.float32]:
    """All rows of a set or, if they are more than `most`, blocks at even distances, `most` rows in all: [S, I].

    Args:
        read: returns rows [start, stop).
    """
    if num_rows <= most:
        return read(0, num_rows)
    starts = np.linspace(0, num_rows - _BLOCK_ROWS, most // _BLOCK_ROWS).astype(np.int64)
    return np.concatenate([read(start, start + _BLOCK_ROWS) for start in starts.tolist()])
