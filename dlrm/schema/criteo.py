"""Columns of Criteo's Display Advertising Challenge and 1TB click logs: label, 13 integers, 26 categoricals."""

from typing import Final

NUM_INTEGER_FEATURES: Final = 13
NUM_CATEGORICAL_FEATURES: Final = 26
ONE_HOT: Final = (1,) * NUM_CATEGORICAL_FEATURES
NUM_COLUMNS: Final = 1 + NUM_INTEGER_FEATURES + NUM_CATEGORICAL_FEATURES

# Names as in torchrec.datasets.criteo, so that weights can be moved between the two.
INTEGER_NAMES: Final = tuple(f"int_{i}" for i in range(NUM_INTEGER_FEATURES))
CATEGORICAL_NAMES: Final = tuple(f"cat_{i}" for i in range(NUM_CATEGORICAL_FEATURES))
TABLE_NAMES: Final = tuple(f"t_{name}" for name in CATEGORICAL_NAMES)

MISSING_DENSE: Final = 0.0
"""A missing integer, in days that tell missing integers apart. All others are log(2) or more there."""
NO_LABEL: Final = -1
"""The label of rows that have none, as `dlrm preprocess` writes them for a trained model."""


def num_kaggle_training_rows(num_rows: int) -> int:
    """How many rows of the single criteo_kaggle file train. They are its first rows, six of its seven days."""
    return num_rows * 6 // 7
