"""Small binary days and raw text whose every row can be told from the others."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from dlrm.dataset.rows import Rows
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES, NUM_INTEGER_FEATURES
from tests.unit.preprocessed import ROWS

WriteDays = Callable[..., Rows]


def _write_days(
    folder: Path,
    rows_per_day: Sequence[int],
    *,
    names: Sequence[str] | None = None,
    sparse_dtype: type[np.integer] = np.int32,
    max_id: int = 2**31 - 1,
    seed: int = 0,
) -> Rows:
    rng = np.random.default_rng(seed)
    num_rows = sum(rows_per_day)
    dense = rng.normal(size=(num_rows, NUM_INTEGER_FEATURES)).astype(np.float32)
    dense[:, 0] = np.arange(num_rows)  # a row's own number
    sparse = rng.integers(0, max_id, (num_rows, NUM_CATEGORICAL_FEATURES), endpoint=True).astype(sparse_dtype)
    labels = rng.integers(0, 2, (num_rows, 1)).astype(np.int32)
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for name, count in zip(names or [f"day_{i}" for i in range(len(rows_per_day))], rows_per_day, strict=True):
        for part, array in (("dense", dense), ("sparse", sparse), ("labels", labels)):
            np.save(folder / f"{name}_{part}.npy", array[start : start + count])
        start += count
    return Rows(dense, (sparse,), labels[:, 0])


@pytest.fixture(scope="session")
def write_days() -> WriteDays:
    """`write_days(folder, rows_per_day)` writes binary days; returns all their rows. Column 0 of dense is the row."""
    return _write_days


def _criteo_lines(num_rows: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(num_rows):
        integers = ["" if rng.random() < 0.2 else str(rng.integers(-3, 5000)) for _ in range(NUM_INTEGER_FEATURES)]
        ids = ["" if rng.random() < 0.1 else f"{rng.integers(0, 2**32):08x}" for _ in range(NUM_CATEGORICAL_FEATURES)]
        lines.append("\t".join([str(rng.integers(0, 2)), *integers, *ids]) + "\n")
    return lines


@pytest.fixture(scope="session")
def criteo_lines() -> Callable[..., list[str]]:
    """`criteo_lines(num_rows)`: lines of raw Criteo text with missing values in them."""
    return _criteo_lines


@pytest.fixture(scope="session")
def lines() -> list[list[str]]:
    """Lines of raw text of three days, with ids that come often, seldom and in the last day only."""
    rng = np.random.default_rng(7)
    days = []
    for day, rows in enumerate(ROWS):
        lines = []
        for _ in range(rows):
            integers = ["" if rng.random() < 0.2 else str(rng.integers(-2 - day // 2, 5000)) for _ in range(13)]
            ids = []
            for column in range(26):
                rank = int(rng.pareto(0.6)) % (3 + 40 * column)
                name = (rank * 0x9E3779B1 + column * 77 + (day == 2 and rng.random() < 0.1)) % 2**32
                ids.append("" if rng.random() < 0.1 else f"{name:08x}")
            lines.append("\t".join([str(int(rng.random() < 0.3)), *integers, *ids]) + "\n")
        days.append(lines)
    return days


@pytest.fixture
def raw(tmp_path, lines) -> Path:
    """A folder with day_0.tsv, day_1.tsv, day_2.tsv."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for day, text in enumerate(lines):
        (folder / f"day_{day}.tsv").write_text("".join(text))
    return folder
