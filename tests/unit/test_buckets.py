import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.preprocess.buckets import (
    KEY_BYTES,
    RECORD_BYTES,
    ArrayFiles,
    Buckets,
    GivenKeys,
    KeySource,
    RandomKeys,
    count_buckets,
    write_at,
    write_rows,
)
from dlrm.preprocess.kernels import bucket_sizes
from dlrm.preprocess.torchrec_compat import merged_ids, numpy_shuffle_positions, round_to_float32
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES, NUM_INTEGER_FEATURES

MASK = 2**64 - 1


class FixedKeys:
    """Keys as they are."""

    def __init__(self, keys: np.ndarray) -> None:
        self._keys = keys

    def keys(self, first_row: int, rows: int) -> np.ndarray:
        return self._keys[first_row : first_row + rows]


def random_columns(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dense [I, R] of any bits that are numbers, indices [F, R], labels [R]; rows differ from each other."""
    rng = np.random.default_rng(seed)
    dense_IR = rng.normal(size=(NUM_INTEGER_FEATURES, rows)).astype(np.float32)
    dense_IR[1, ::3] = -0.0
    indices_FR = rng.integers(0, 2**31, (NUM_CATEGORICAL_FEATURES, rows), np.int32)
    indices_FR[0] = np.arange(rows)
    return dense_IR, indices_FR, rng.integers(0, 2, rows, np.uint8)


def shuffle_into(
    folder: Path,
    source: KeySource,
    columns: tuple[np.ndarray, np.ndarray, np.ndarray],
    num_buckets: int,
    cuts: list[int],
    day_rows: list[int],
    seed: int = 0,
) -> list[ArrayFiles]:
    """Scatters the rows in blocks that end at `cuts`, and gathers; blocks and buckets in any order."""
    rows = columns[0].shape[1]
    rng = np.random.default_rng(seed)
    (folder / "buckets").mkdir(parents=True)
    days = [ArrayFiles(folder, f"day_{day}", count) for day, count in enumerate(day_rows)]
    for day in days:
        day.create()
    buckets = Buckets(folder / "buckets", count_buckets(source, rows, num_buckets))
    places, work = np.zeros(num_buckets, np.int64), []
    for start, stop in itertools.pairwise([0, *sorted(cuts), rows]):
        keys_R = source.keys(start, stop - start)
        work.append((keys_R, places.copy(), *(np.ascontiguousarray(part[..., start:stop]) for part in columns)))
        bucket_sizes(keys_R, places)
    assert tuple(places.tolist()) == buckets.sizes
    for block in rng.permutation(len(work)):
        buckets.scatter(*work[block])
    for bucket, size in enumerate(buckets.sizes):
        path = buckets.path(bucket)
        assert (path.stat().st_size if path.exists() else 0) == (KEY_BYTES + RECORD_BYTES) * size
    for bucket in rng.permutation(num_buckets):
        touched = buckets.gather(int(bucket), days)
        assert bool(touched) == (buckets.sizes[bucket] > 0)
    return days


def load(days: list[ArrayFiles]) -> list[np.ndarray]:
    """Dense, indices and labels of all days."""
    parts = [[np.load(path) for path in day.paths] for day in days]
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def assert_rows(days: list[ArrayFiles], columns: tuple[np.ndarray, np.ndarray, np.ndarray], order: np.ndarray) -> None:
    dense_RI, indices_RF, labels_R1 = load(days)
    assert dense_RI.tobytes() == columns[0][:, order].T.tobytes()
    np.testing.assert_array_equal(indices_RF, columns[1][:, order].T)
    np.testing.assert_array_equal(labels_R1[:, 0], columns[2][order])
    assert (dense_RI.dtype, indices_RF.dtype, labels_R1.dtype) == (np.float32, np.int32, np.int32)


@st.composite
def shuffles(draw: st.DrawFn) -> tuple[np.ndarray, int, list[int], list[int]]:
    """Keys, of which some may be equal, number of buckets, ends of blocks, rows of days."""
    rows = draw(st.integers(0, 700))
    seed = draw(st.integers(0, 2**64 - 1))
    keys_R = RandomKeys(seed).keys(0, rows)
    kind = draw(st.sampled_from(("random", "few", "ends", "one")))
    if kind == "few":
        keys_R = keys_R >> np.uint64(61) << np.uint64(61)
    elif kind == "ends":
        keys_R = np.where(keys_R % np.uint64(2), np.uint64(MASK), np.uint64(0))
    elif kind == "one":
        keys_R = np.full(rows, seed, np.uint64)
    cuts = draw(st.lists(st.integers(0, rows), max_size=5, unique=True))
    ends = sorted(draw(st.lists(st.integers(0, rows), max_size=3)))
    return keys_R, draw(st.integers(1, 40)), cuts, np.diff([0, *ends, rows]).tolist()


@settings(deadline=None, max_examples=120)
@given(shuffles())
def test_every_row_comes_out_once_in_the_order_of_the_keys(shuffle):
    keys_R, num_buckets, cuts, day_rows = shuffle
    columns = random_columns(len(keys_R))
    with tempfile.TemporaryDirectory() as folder:
        days = shuffle_into(Path(folder) / "days", FixedKeys(keys_R), columns, num_buckets, cuts, day_rows)
        assert_rows(days, columns, np.argsort(keys_R, kind="stable"))


def test_buckets_and_blocks_change_nothing(tmp_path):
    columns = random_columns(3000)
    source = RandomKeys(11)
    contents = set()
    for i, (num_buckets, cuts) in enumerate(
        [(1, []), (2, [1000]), (7, [1, 2999]), (64, [256, 512, 700]), (1000, list(range(0, 3000, 100)))]
    ):
        days = shuffle_into(tmp_path / str(i), source, columns, num_buckets, cuts, [1, 1999, 0, 1000], seed=i)
        contents.add(tuple(path.read_bytes() for day in days for path in day.paths))
    assert len(contents) == 1
    assert_rows(days, columns, np.argsort(source.keys(0, 3000), kind="stable"))
    assert load(days)[1][:, 0].tolist() != list(range(3000))


def test_columns_that_are_parts_of_larger_ones(tmp_path):
    columns = random_columns(900)
    source = RandomKeys(3)
    keys_R = source.keys(0, 500)
    buckets = Buckets(tmp_path, count_buckets(source, 500, 3))
    day = ArrayFiles(tmp_path, "day_0", 500)
    day.create()
    buckets.scatter(keys_R, np.zeros(3, np.int64), *(part[..., :500] for part in columns))
    for bucket in range(3):
        buckets.gather(bucket, [day])
    assert_rows([day], columns, np.argsort(keys_R, kind="stable"))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 1000, 4097])
@pytest.mark.parametrize("num_buckets", [1, 2, 13])
def test_given_keys_put_rows_at_their_positions(rows, num_buckets, tmp_path):
    positions = np.random.default_rng(rows).permutation(rows)
    source, columns = GivenKeys(positions), random_columns(rows)
    keys_R = np.concatenate([source.keys(0, rows // 2), source.keys(rows // 2, rows - rows // 2)])
    np.testing.assert_array_equal(np.argsort(keys_R, kind="stable")[positions], np.arange(rows))
    days = shuffle_into(tmp_path / "days", source, columns, num_buckets, [rows // 3], [rows])
    rows_at = load(days)[1][:, 0]
    np.testing.assert_array_equal(rows_at[positions], np.arange(rows))


def test_given_keys_of_many_rows_keep_their_order():
    for rows in (1, 2, 3, 2**20 + 7, 6_000_001):
        keys_R = GivenKeys(np.arange(rows)).keys(0, rows)
        assert keys_R.dtype == np.uint64
        assert (keys_R[1:] > keys_R[:-1]).all()
        sizes = count_buckets(GivenKeys(np.arange(rows)), rows, 10)
        assert sum(sizes) == rows
        assert max(sizes) <= rows // 10 + 2
    assert len(GivenKeys(np.empty(0, np.int64)).keys(0, 0)) == 0


def split_mix(seed: int, row: int) -> int:
    z = (seed + (row + 1) * 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


@pytest.mark.parametrize("seed", [0, 1, 2**63, MASK])
@pytest.mark.parametrize("first_row", [0, 5, 2**32 - 3, 2**40])
def test_random_keys_against_their_definition(seed, first_row):
    assert RandomKeys(seed).keys(first_row, 6).tolist() == [split_mix(seed, first_row + i) for i in range(6)]


def test_random_keys_do_not_depend_on_blocks():
    source = RandomKeys(2**64 - 12345)
    whole = source.keys(0, 10_000)
    for cuts in ([5000], [1, 2, 3], list(range(0, 10_000, 97)), [9999]):
        bounds = itertools.pairwise([0, *cuts, 10_000])
        parts = [source.keys(start, stop - start) for start, stop in bounds]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert len(np.unique(whole)) == 10_000
    assert not np.intersect1d(whole, RandomKeys(7).keys(0, 10_000)).size


@pytest.mark.parametrize("kind", ["counted", "random"])
@pytest.mark.parametrize("first_row", [0, 4_000_000_000])
def test_every_order_is_equally_likely(kind, first_row):
    num_seeds, rows = 24_000, 4
    random_seeds = np.random.default_rng(8).integers(0, 2**64, num_seeds, np.uint64).tolist()
    seeds = range(num_seeds) if kind == "counted" else random_seeds
    keys_SR = np.array([RandomKeys(seed).keys(first_row, rows) for seed in seeds])
    orders, counts = np.unique(np.argsort(keys_SR, axis=1), axis=0, return_counts=True)
    assert len(orders) == 24
    chi_square = ((counts - num_seeds / 24) ** 2 / (num_seeds / 24)).sum()
    assert 4 < chi_square < 60  # 23 degrees of freedom: one in 30,000 is above, or below


def test_a_row_may_come_to_any_place():
    """Of 100 rows in 4,000 shuffles: each tenth of the rows comes to each tenth of the places equally often."""
    keys_SR = np.array([RandomKeys(seed).keys(0, 100) for seed in range(4000)])
    places = np.argsort(np.argsort(keys_SR, axis=1), axis=1)
    tenths = [places[:, first : first + 10].ravel() // 10 for first in range(0, 100, 10)]
    counts = np.array([np.bincount(tenth, minlength=10) for tenth in tenths])
    assert counts.sum() == 400_000
    assert abs(counts - 4000).max() < 5 * 4000**0.5


@pytest.mark.parametrize("num_buckets", [1, 2, 3, 10, 1000, 1024])
@pytest.mark.parametrize("chunk_rows", [1, 700, 1 << 20])
def test_bucket_counts_are_a_histogram(num_buckets, chunk_rows):
    rows = 2000
    keys_R = RandomKeys(5).keys(0, rows)
    keys_R[:4] = [0, MASK, 2**63, 2**63 - 1]
    keys_R[4:300] = keys_R[4] >> np.uint64(20) << np.uint64(20)
    expected = np.zeros(num_buckets, np.int64)
    for key in keys_R.tolist():
        expected[(key >> 32) * num_buckets >> 32] += 1
    assert count_buckets(FixedKeys(keys_R), rows, num_buckets, chunk_rows) == tuple(expected.tolist())
    assert sum(expected) == rows


def test_bucket_starts():
    assert Buckets(Path(), (3, 0, 5)).starts == (0, 3, 3, 8)


@pytest.mark.parametrize("rows", [0, 1, 5, 99_999, 1_000_000])
@pytest.mark.parametrize("ids_dtype", ["<i4", "<i8"])
def test_new_arrays_are_what_numpy_saves(rows, ids_dtype, tmp_path):
    day = ArrayFiles(tmp_path, "day_0", rows, np.dtype(ids_dtype))
    day.create()
    assert [path.name for path in day.paths] == ["day_0_dense.npy", "day_0_sparse.npy", "day_0_labels.npy"]
    for path, dtype, columns in zip(day.paths, ("<f4", ids_dtype, "<i4"), (13, 26, 1), strict=True):
        with (tmp_path / "reference.npy").open("wb") as file:
            np.save(file, np.zeros((rows if rows < 1000 else 0, columns), dtype))
        reference = (tmp_path / "reference.npy").read_bytes()
        if rows < 1000:
            assert path.read_bytes() == reference
        array = np.load(path, mmap_mode="r" if rows else None)
        assert (array.shape, array.dtype) == ((rows, columns), np.dtype(dtype))
        assert path.stat().st_size == 128 + rows * columns * np.dtype(dtype).itemsize


@pytest.mark.parametrize("ids_dtype", ["<i4", "<i8"])
def test_written_arrays_are_what_numpy_saves(ids_dtype, tmp_path):
    dense_IR, indices_FR, labels_R = random_columns(5)
    day = ArrayFiles(tmp_path, "day_0", 5, np.dtype(ids_dtype))
    for path in day.paths:
        path.write_bytes(b"left by a run that was stopped" * 100)
    day.create()
    for rows in (slice(3, 5), slice(0, 1), slice(1, 3)):
        day.write(rows.start, dense_IR[:, rows].T, indices_FR[:, rows].T, labels_R[rows])
    references = (dense_IR.T, indices_FR.T.astype(ids_dtype), labels_R[:, None].astype(np.int32))
    for path, reference in zip(day.paths, references, strict=True):
        np.save(tmp_path / "reference.npy", np.ascontiguousarray(reference))
        assert path.read_bytes() == (tmp_path / "reference.npy").read_bytes()


@pytest.mark.parametrize(
    ("first_row", "rows", "touched"),
    [
        (0, 10, [0, 2, 3]),
        (0, 4, [0]),
        (3, 1, [0]),
        (3, 2, [0, 2]),
        (4, 3, [2]),
        (6, 4, [2, 3]),
        (9, 1, [3]),
        (4, 0, []),
    ],
)
def test_rows_are_written_to_the_days_they_fall_into(first_row, rows, touched, tmp_path):
    dense_IR, indices_FR, labels_R = random_columns(10)
    days = [ArrayFiles(tmp_path, f"day_{day}", count) for day, count in enumerate((4, 0, 3, 3))]
    for day in days:
        day.create()
    here = slice(first_row, first_row + rows)
    found = write_rows(days, first_row, dense_IR[:, here].T, indices_FR[:, here].T, labels_R[here])
    assert found == [days[day] for day in touched]
    dense_RI, indices_RF, labels_R1 = load(days)
    outside = np.setdiff1d(np.arange(10), np.arange(first_row, first_row + rows))
    for written, part in ((dense_RI, dense_IR.T), (indices_RF, indices_FR.T), (labels_R1, labels_R[:, None])):
        np.testing.assert_array_equal(written[here], part[here])
        assert not written[outside].any()


def test_bytes_are_written_where_they_belong(tmp_path):
    write_at(tmp_path / "file", 8, np.array([[1, 2]], np.int32))
    write_at(tmp_path / "file", 0, np.array([7], np.uint64))
    assert (tmp_path / "file").read_bytes() == np.array([7, 1 | 2 << 32], np.uint64).tobytes()


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 1000, 70_001])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_positions_are_those_of_numpy_s_shuffle(seed, rows, memory_bytes, tmp_path):
    array = np.repeat(np.arange(rows, dtype=np.float32)[:, None], 3, axis=1)
    state = np.random.get_state()
    try:
        np.random.seed(seed)
        np.random.shuffle(array)
        positions = numpy_shuffle_positions(rows, seed, tmp_path, memory_bytes)
        after = np.random.get_state()
        np.random.seed(seed)
        np.random.shuffle(np.arange(rows))
        assert after[2] == np.random.get_state()[2]
    finally:
        np.random.set_state(state)
    np.testing.assert_array_equal(array[positions, 0], np.arange(rows))
    np.testing.assert_array_equal(array[:, 0], array[:, 2])
    assert np.issubdtype(positions.dtype, np.integer)
    assert sorted(path.name for path in tmp_path.iterdir()) == (
        ["order", "positions"] if rows and not memory_bytes else []
    )
    if rows:
        keys_R = GivenKeys(positions).keys(0, rows)
        np.testing.assert_array_equal(np.argsort(keys_R, kind="stable"), array[:, 0])


def test_a_shuffle_in_the_midst_of_memory(tmp_path):
    """As many bytes as the two arrays take are enough."""
    for memory_bytes, files in ((1600, 0), (1599, 2)):
        folder = tmp_path / str(memory_bytes)
        folder.mkdir()
        numpy_shuffle_positions(100, 0, folder, memory_bytes)
        assert len(list(folder.iterdir())) == files


EXACT = 2**24 - 10


@pytest.mark.parametrize(
    "num_indices",
    [2, 3, 1000, *range(2**24 - 3, 2**24 + 12), 2**24 + 4099, 2**24 + 10_000, 2**25 + 1_000_003],
)
def test_merged_ids_are_those_that_float32_merges(num_indices):
    """Whole numbers below EXACT are float32 numbers."""
    high = np.arange(min(EXACT, num_indices), num_indices).astype(np.float32)
    distinct = min(EXACT, num_indices) + len(np.unique(high))
    assert merged_ids(num_indices - 2) == num_indices - distinct


@pytest.mark.parametrize("power", [24, 25, 26, 28, 30])
@pytest.mark.parametrize("before", [1000, 513, 64, 3, 1, 0, -1, -300])
@pytest.mark.parametrize("more", [1, 2, 65, 1024, 1777])
def test_merged_ids_grow_as_float32_has_it(more, before, power):
    """What more indices add: those that are no new number beside the last one before them."""
    few = 2**power - before
    numbers = np.arange(few - 1, few + more).astype(np.float32)
    assert merged_ids(few + more - 2) - merged_ids(few - 2) == more - (len(np.unique(numbers)) - 1)


def test_round_to_float32():
    indices = np.array([0, 1, 2**24, 2**24 + 1, 2**24 + 3, 2**25 + 2, 2**30 + 65], np.int32)
    rounded = round_to_float32(indices)
    assert rounded.dtype == np.int32
    assert rounded.tolist() == [0, 1, 2**24, 2**24, 2**24 + 4, 2**25, 2**30 + 128]
