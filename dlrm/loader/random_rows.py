"""Random rows, new ones at every step. They depend on the seed, and not on the number of ranks.

Shapes: B samples, I integer features, N ids per sample.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dlrm.dataset.rows import Rows
from dlrm.schema.criteo import NUM_INTEGER_FEATURES

_WORDS_PER_COUNTER = 4  # Philox4x64 turns one counter value into four 64-bit words


@dataclass(frozen=True)
class RandomRows:
    """An endless table. Row i depends only on the seed and on i.

    Integers are uniform in [0, 1). Every second row is a click, whatever its features, so that any model has an AUROC
    of 0.5. (If labels were drawn at random, batches of 32 would be unbalanced, and the public example's default
    learning rate of 15 would often end in NaN within its 10 steps.) Ids follow a power law: with exponent s and R rows,
    P(id = k) is the integral of x^-s over [k + 1, k + 2), divided by the integral over [1, R + 1); s = 0 is uniform.

    Attributes:
        table_rows: rows of each table.
        hotness: ids per sample of each feature.
        zipf_exponent: s.
        seed: of this stream.
    """

    table_rows: tuple[int, ...]
    hotness: tuple[int, ...]
    zipf_exponent: float
    seed: int

    @cached_property
    def _rows_of_column(self) -> npt.NDArray[np.float64]:
        return np.repeat(np.array(self.table_rows, dtype=np.float64), self.hotness)

    @property
    def _counters_per_row(self) -> int:
        return -(-(NUM_INTEGER_FEATURES + sum(self.hotness)) // _WORDS_PER_COUNTER)

    def read(self, start: int, stop: int) -> Rows:
        """Rows [start, stop)."""
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=start * self._counters_per_row))
        # One word makes one number. `random_raw` would do too, but it does not let other threads run.
        uniform_BW = generator.random((stop - start, self._counters_per_row * _WORDS_PER_COUNTER))
        labels_B = (np.arange(start, stop) % 2).astype(np.int32)
        dense_BI = uniform_BW[:, :NUM_INTEGER_FEATURES].astype(np.float32)
        uniform_BN = uniform_BW[:, NUM_INTEGER_FEATURES : NUM_INTEGER_FEATURES + sum(self.hotness)]
        return Rows(dense_BI, (draw_ids(uniform_BN, self._rows_of_column, self.zipf_exponent),), labels_B)


def draw_ids(
    uniform_BN: npt.NDArray[np.float64], rows_N: npt.NDArray[np.float64], exponent: float
) -> npt.NDArray[np.int32]:
    """Draws ids in [0, rows) by inverting the distribution function of `RandomRows`.

    Args:
        uniform_BN: uniform in [0, 1).
        rows_N: rows of the table of each column.
    """
    if exponent == 0.0:
        drawn_BN = uniform_BN * rows_N
    elif exponent == 1.0:
        drawn_BN = np.exp(uniform_BN * np.log1p(rows_N)) - 1.0
    else:
        power = 1.0 - exponent
        drawn_BN = (1.0 + uniform_BN * ((1.0 + rows_N) ** power - 1.0)) ** (1.0 / power) - 1.0
    return np.minimum(drawn_BN, rows_N - 1.0).astype(np.int32)
