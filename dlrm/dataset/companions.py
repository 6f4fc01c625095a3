"""Companions: the random ids that MLPerf's DLRM v2 puts beside an id to make one-hot data multi-hot.

An id x of feature f becomes x, t[x][0], t[x][1], ...: t is f's table of companions, int32 [rows, hotness - 1]. The
tables of all features are drawn once, in turn (MLCommons, recommendation_v2/torchrec_dlrm/multi_hot.py).
`dlrm materialize` writes the expanded ids to disk; the trainer can also expand ids as it reads them.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

Distribution = Literal["uniform", "pareto"]

COMPANIONS_SEED = 0
"""The seed of MLPerf's data."""
PARETO_SHAPE = 0.25
_PIECE_IDS = 1 << 20


def draw_table(
    generator: np.random.RandomState, distribution: Distribution, rows: int, num_companions: int
) -> Iterator[npt.NDArray[np.int32]]:
    """A feature's table of companions, row after row, in pieces of a few MiB."""
    left = rows * num_companions
    while left:
        count = min(left, _PIECE_IDS)
        yield draw_companions(generator, distribution, rows, count)
        left -= count


def draw_companions(
    generator: np.random.RandomState, distribution: Distribution, rows: int, count: int
) -> npt.NDArray[np.int32]:
    """The next `count` ids of a table of `rows` rows. They are the same whether drawn at once or in pieces."""
    if distribution == "uniform":
        return generator.randint(0, rows, count).astype(np.int32)
    values = generator.pareto(PARETO_SHAPE, count)
    # MLCommons casts with astype(int32). On x86 a number of more than 32 bits then becomes -2**31; other processors
    # differ, so we do it explicitly.
    return (np.where(values < 2**31, values, -(2**31)).astype(np.int32) % rows).astype(np.int32)
