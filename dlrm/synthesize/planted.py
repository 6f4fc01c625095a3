"""A click log that can be computed: a row's values and click probability depend only on the seed and its number.

There are no tables: an id's effect is drawn from a hash of the id, so that columns can be as large as the real ones.
Shapes: R rows, I integer features, F categorical features.
"""

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from dlrm.preprocess.kernels import GOLDEN_GAMMA, compiled, mix, split_mix
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES, NUM_INTEGER_FEATURES

# For each column of the Criteo Display Advertising Challenge's log: the share of missing values, and mean and standard
# deviation of log(1 + x), measured on its first 120,000 rows.
INTEGER_MISSING: Final = np.array([0.45, 0.0, 0.21, 0.21, 0.03, 0.22, 0.04, 0.0, 0.04, 0.45, 0.04, 0.77, 0.21])
INTEGER_MEAN: Final = np.array([0.87, 2.10, 2.15, 1.70, 7.28, 3.40, 1.63, 2.04, 3.54, 0.40, 0.92, 0.29, 1.73])
INTEGER_SPREAD: Final = np.array([0.98, 2.11, 1.19, 0.91, 2.93, 1.76, 1.38, 1.15, 1.63, 0.40, 0.77, 0.62, 0.96])
NEGATIVE_COLUMN, NEGATIVE_SHARE = 1, 0.10
ID_MISSING: Final = np.zeros(NUM_CATEGORICAL_FEATURES)
ID_MISSING[[2, 3, 11, 15, 20, 23]], ID_MISSING[5] = 0.035, 0.12
ID_MISSING[[18, 19, 24, 25]], ID_MISSING[21] = 0.44, 0.76
MISSING_INTEGER: Final = -(2**31)
ZIPF_EXPONENT = 1.1
LATENT_DIM = 2
MAX_ROW_BYTES = 2 + NUM_INTEGER_FEATURES * 12 + NUM_CATEGORICAL_FEATURES * 9

# Shares of the logit's variance.
_ID_SHARE, _PAIR_SHARE, _INTEGER_SHARE = 0.60, 0.15, 0.25
_NUM_PAIRS = NUM_CATEGORICAL_FEATURES // 2
_DRAWS = 128  # most random numbers of a row
_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
_TAB, _NEWLINE, _MINUS, _ZERO = 9, 10, 45, 48


@compiled
def _hash(number: np.uint64) -> np.uint64:
    return split_mix(np.uint64(number) * GOLDEN_GAMMA)


@compiled
def _uniform(bits: np.uint64) -> float:
    return ((bits >> np.uint64(12)) + 0.5) * 2.0**-52


@compiled
def _normal(bits: np.uint64) -> float:
    """An approximately standard normal number: the sum of four uniform 16-bit numbers."""
    low = np.uint64(0xFFFF)
    total = (bits & low) + ((bits >> np.uint64(16)) & low) + ((bits >> np.uint64(32)) & low) + (bits >> np.uint64(48))
    return (np.float64(total) / 65536.0 - 2.0) * 1.7320508


@compiled
def draw_rows(
    seed: np.uint64,
    stream: np.uint64,
    first_row: int,
    table_rows_F: npt.NDArray[np.int64],
    integers_IR: npt.NDArray[np.int32],
    ranks_FR: npt.NDArray[np.int64],
    scores_R: npt.NDArray[np.float64],
    luck_R: npt.NDArray[np.float64],
) -> None:
    """Draws rows and their scores.

    Args:
        seed: of the planted model, which is the same for all days.
        stream: seed of the rows.
        table_rows_F: number of ids of each column.
        integers_IR: takes values; MISSING_INTEGER if one is missing.
        ranks_FR: takes each id's rank in its column, from 0 for the most frequent one; -1 if the id is missing.
        scores_R: takes scores. A row's logit is an affine function of its score.
        luck_R: takes numbers in (0, 1): a row is a click if its probability is larger.
    """
    id_weight = math.sqrt(_ID_SHARE / NUM_CATEGORICAL_FEATURES)
    pair_weight = math.sqrt(_PAIR_SHARE / _NUM_PAIRS / LATENT_DIM)
    integer_weight = math.sqrt(_INTEGER_SHARE / NUM_INTEGER_FEATURES / 0.55)
    tail = 1.0 - ZIPF_EXPONENT
    hashes_F = np.empty(NUM_CATEGORICAL_FEATURES, np.uint64)
    for i in range(len(scores_R)):
        state = stream + np.uint64(first_row + i) * np.uint64(_DRAWS)
        score = 0.0
        for c in range(NUM_INTEGER_FEATURES):
            slope = _normal(_hash(seed + np.uint64(c)))
            u = _uniform(_hash(state + np.uint64(2 * c + 1)))
            if _uniform(_hash(state + np.uint64(2 * c))) < INTEGER_MISSING[c]:
                value = np.int64(MISSING_INTEGER)
            elif c == NEGATIVE_COLUMN and u < NEGATIVE_SHARE:
                value = -1 - np.int64(2.99 * (u / NEGATIVE_SHARE) ** 8)  # mostly -1, down to -3
            else:
                # A logistic variable with the column's mean and spread, on the scale of log(1 + x).
                level = INTEGER_MEAN[c] + INTEGER_SPREAD[c] * 0.5513 * math.log(u / (1.0 - u))
                value = np.int64(max(math.exp(min(level, 14.0)) - 1.0, 0.0))
            integers_IR[c, i] = value
            # A missing integer counts as 0, as in preprocessing.
            level = (math.log(max(value, 0) + 1.0) - INTEGER_MEAN[c]) / INTEGER_SPREAD[c]
            score += integer_weight * slope * math.tanh(level)
        for c in range(NUM_CATEGORICAL_FEATURES):
            if _uniform(_hash(state + np.uint64(40 + 2 * c))) < ID_MISSING[c]:
                rank = np.int64(-1)
            else:
                u = _uniform(_hash(state + np.uint64(41 + 2 * c)))
                rows = table_rows_F[c]
                # Inverts the distribution function of a continuous power law over [1, rows + 1).
                place = (1.0 + u * ((rows + 1.0) ** tail - 1.0)) ** (1.0 / tail)
                rank = min(np.int64(place) - 1, rows - 1)
            ranks_FR[c, i] = rank
            hashes_F[c] = _hash(seed + np.uint64(1000) + (np.uint64(c) << np.uint64(40)) + np.uint64(rank + 1))
            score += id_weight * _normal(hashes_F[c])
        for pair in range(_NUM_PAIRS):
            left, right = hashes_F[2 * pair], hashes_F[2 * pair + 1]
            for k in range(1, LATENT_DIM + 1):
                score += pair_weight * _normal(_hash(left + np.uint64(k))) * _normal(_hash(right + np.uint64(k)))
        scores_R[i] = score
        luck_R[i] = _uniform(_hash(state + np.uint64(100)))


@compiled
def write_text(
    labels_R: npt.NDArray[np.uint8],
    integers_IR: npt.NDArray[np.int32],
    ranks_FR: npt.NDArray[np.int64],
    text: npt.NDArray[np.uint8],
) -> int:
    """Writes rows as Criteo text; returns its size.

    Args:
        text: takes the bytes; needs MAX_ROW_BYTES for each row.
    """
    at = 0
    digits = np.empty(12, np.uint8)
    for i in range(len(labels_R)):
        text[at] = _ZERO + labels_R[i]
        at += 1
        for c in range(NUM_INTEGER_FEATURES):
            text[at] = _TAB
            at += 1
            value = np.int64(integers_IR[c, i])
            if value == MISSING_INTEGER:
                continue
            if value < 0:
                text[at] = _MINUS
                at += 1
                value = -value
            count = 0
            while value > 0 or count == 0:
                digits[count] = _ZERO + value % 10
                value //= 10
                count += 1
            while count > 0:
                count -= 1
                text[at] = digits[count]
                at += 1
        for c in range(NUM_CATEGORICAL_FEATURES):
            text[at] = _TAB
            at += 1
            if ranks_FR[c, i] >= 0:
                # A bijection, so that the ids of a column are distinct, and none is 0.
                name = mix(np.uint32(np.uint64(ranks_FR[c, i]) + np.uint64(1)) ^ np.uint32(c << 27))
                for digit in range(8):
                    text[at] = _HEX[(name >> np.uint32(28 - 4 * digit)) & np.uint32(15)]
                    at += 1
        text[at] = _NEWLINE
        at += 1
    return at
