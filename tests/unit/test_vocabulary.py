from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dlrm.errors import DatasetError
from dlrm.preprocess import vocabulary
from dlrm.preprocess.kernels import count_ids, insert_slots, look_up_ids, mix, mix_ids, unmix, unmix_ids
from dlrm.preprocess.vocabulary import (
    FIRST_INDEX,
    MISSING_INDEX,
    RARE_INDEX,
    Choice,
    Counted,
    choose_by_first_row,
    choose_by_frequency,
    count_column,
    load_entries,
    lookup_tables,
    read_entries,
    vocabulary_files,
)

SMALLEST, LARGE = 1 << 16, 64 << 20
EDGES = np.array([0, 1, 2, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1], np.uint32)


def mixed_of(ids: np.ndarray) -> np.ndarray:
    mixed = np.empty(len(ids), np.uint32)
    mix_ids(np.asarray(ids, np.uint32), mixed)
    return mixed


def unmixed_of(mixed: np.ndarray) -> np.ndarray:
    ids = np.empty(len(mixed), np.uint32)
    unmix_ids(np.asarray(mixed, np.uint32), ids)
    return ids


def column_of(kind: str) -> np.ndarray:
    """Ids, some of them 0."""
    rng = np.random.default_rng(len(kind))
    rows = 60_000
    ids = {
        "few": lambda: rng.integers(0, 50, rows),
        "zipf": lambda: rng.zipf(1.2, rows) % 2**32,
        "sequential": lambda: np.arange(rows),
        "sequential from the top": lambda: 2**32 - 1 - np.arange(rows),
        "strided": lambda: np.arange(rows) * 2**16 % 2**32,
        "hashed": lambda: rng.integers(0, 2**32, rows),
        "each twice": lambda: np.tile(rng.permutation(rows // 2), 2),
        "first bits alike": lambda: unmixed_of(rng.integers(0, 2**30, rows // 3) | 0x80000000),
        "last bits alike": lambda: unmixed_of(rng.integers(0, 2**17, rows) << 15),
        "missing": lambda: np.zeros(rows),
    }[kind]()
    ids = ids.astype(np.uint32)
    ids[rng.random(len(ids)) < 0.05] = 0
    return ids


KINDS = (
    "few", "zipf", "sequential", "sequential from the top", "strided", "hashed", "each twice", "first bits alike",
    "last bits alike", "missing",
)  # fmt: skip


def blocks_of(ids: np.ndarray, block_rows: int = 7001, gap: int = 0) -> vocabulary.IdBlocks:
    """Passes over `ids` in blocks, between which `gap` row numbers are left out."""

    def blocks() -> Iterator[tuple[int, np.ndarray]]:
        for block, start in enumerate(range(0, len(ids), block_rows)):
            yield start + block * gap, ids[start : start + block_rows]

    return blocks


def parts_of(entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and values."""
    return unmixed_of(entries >> np.uint64(32)), (entries & np.uint64(2**32 - 1)).astype(np.int64)


def test_mix_and_unmix_are_inverse():
    ids = np.concatenate([EDGES, np.random.default_rng(0).integers(0, 2**32, 1_000_000, np.uint32)])
    np.testing.assert_array_equal(unmixed_of(mixed_of(ids)), ids)
    np.testing.assert_array_equal(mixed_of(unmixed_of(ids)), ids)
    for number in EDGES:
        assert unmix(mix(number)) == number
        assert mix(number) == mixed_of(np.array([number]))[0]
    assert mix(np.uint32(0)) == 0


def test_mix_against_its_definition():
    for number in [*EDGES.tolist(), *np.random.default_rng(1).integers(0, 2**32, 500).tolist()]:
        x = number ^ (number >> 16)
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        assert mix(np.uint32(number)) == x ^ (x >> 16)


@pytest.mark.parametrize("shift", [0, 12, 16])
def test_mix_spreads_sequences(shift):
    mixed = mixed_of(np.arange(2**16, dtype=np.uint32) << np.uint32(shift))
    assert len(np.unique(mixed)) == 2**16
    counts = np.bincount(mixed >> np.uint32(26), minlength=64)
    assert counts.min() > 0.8 * 2**10
    assert counts.max() < 1.2 * 2**10


@pytest.mark.parametrize("order", ["frequency", "first_seen"])
@pytest.mark.parametrize("memory_bytes", [SMALLEST, 1 << 18, LARGE])
@pytest.mark.parametrize("kind", KINDS)
def test_counts(kind, memory_bytes, order):
    ids = column_of(kind)
    gap = 1000
    passes: list[Counted] = list(count_column(blocks_of(ids, gap=gap), order, memory_bytes))
    entries = np.concatenate([counted.entries for counted in passes])
    expected = Counter(ids[ids != 0].tolist())
    assert len(entries) == len(expected)
    keys = entries >> np.uint64(32)
    assert (keys[1:] > keys[:-1]).all()
    found_ids, counts = parts_of(entries)
    assert dict(zip(found_ids.tolist(), counts.tolist(), strict=True)) == expected
    # A table takes 60% of its slots, of 16 bytes each, and as many for a copy where rows are kept too.
    most = 0.6 * memory_bytes / (16 if order == "frequency" else 32)
    assert (len(passes) > 1) == (len(expected) > max(most, 0.6 * 4096))
    if order == "first_seen":
        rows = np.concatenate([counted.first_rows for counted in passes])
        distinct, first = np.unique(ids, return_index=True)
        first_of = dict(zip(distinct.tolist(), (first + first // 7001 * gap).tolist(), strict=True))
        assert rows.tolist() == [first_of[value] for value in found_ids.tolist()]
    else:
        assert all(len(counted.first_rows) == 0 for counted in passes)


@pytest.mark.parametrize("block_rows", [1, 2, 1000, 10**6])
def test_counts_do_not_depend_on_blocks(block_rows):
    ids = column_of("zipf")[:6000]
    whole = next(count_column(blocks_of(ids), "first_seen", LARGE))
    parts = list(count_column(blocks_of(ids, block_rows), "first_seen", SMALLEST))
    np.testing.assert_array_equal(np.concatenate([part.entries for part in parts]), whole.entries)
    np.testing.assert_array_equal(np.concatenate([part.first_rows for part in parts]), whole.first_rows)


def test_a_column_without_rows():
    for order in ("frequency", "first_seen"):
        (counted,) = count_column(blocks_of(np.empty(0, np.uint32)), order, LARGE)
        assert len(counted.entries) == len(counted.first_rows) == 0


def test_first_rows_past_32_bits():
    ids = np.array([7, 0, 7, 9], np.uint32)
    (counted,) = count_column(lambda: iter([(2**33, ids), (2**33 + 4, ids[::-1].copy())]), "first_seen", LARGE)
    found, counts = parts_of(counted.entries)
    assert dict(zip(found.tolist(), zip(counts.tolist(), counted.first_rows.tolist(), strict=True), strict=True)) == {
        7: (4, 2**33),
        9: (2, 2**33 + 3),
    }


def test_a_count_stays_at_its_greatest():
    ids = np.array([3, 4, 5], np.uint32)
    starts = np.array([2**32 - 3, 2**32 - 1, 1], np.uint64)
    slots, nothing = np.zeros(4096, np.uint64), np.empty(0, np.int64)
    insert_slots((mixed_of(ids).astype(np.uint64) << np.uint64(32)) | starts, nothing, slots, nothing, 0)
    assert count_ids(np.repeat(ids, 10), 0, slots, nothing, 3, 2000, 0, 0) == (30, 3)
    found, counts = parts_of(slots[slots != 0])
    assert dict(zip(found.tolist(), counts.tolist(), strict=True)) == {3: 2**32 - 1, 4: 2**32 - 1, 5: 11}


def test_counting_stops_at_the_limit():
    slots, first_rows = np.zeros(64, np.uint64), np.zeros(64, np.int64)
    ids = np.array([5, 6, 5, 0, 7, 5], np.uint32)
    assert count_ids(ids, 100, slots, first_rows, 0, 2, 0, 0) == (4, 2)
    assert count_ids(ids[4:], 104, slots, first_rows, 2, 3, 0, 0) == (2, 3)
    taken = np.flatnonzero(slots)
    found, counts = parts_of(slots[taken])
    assert dict(zip(found.tolist(), zip(counts.tolist(), first_rows[taken].tolist(), strict=True), strict=True)) == {
        5: (3, 100),
        6: (1, 101),
        7: (1, 104),
    }


def entries_of(counts: dict[int, int]) -> np.ndarray:
    """Entries with counts, ascending by mixed id."""
    ids, values = np.array(list(counts), np.uint32), np.array(list(counts.values()), np.uint64)
    return np.sort((mixed_of(ids).astype(np.uint64) << np.uint64(32)) | values)


def random_counts(num_ids: int, seed: int = 0) -> dict[int, int]:
    """Ids with counts that are often the same, some of them very large."""
    rng = np.random.default_rng(seed)
    ids = np.unique(rng.integers(1, 2**32, num_ids, np.uint32))
    counts = np.minimum(rng.zipf(1.5, len(ids)), 2**32 - 1)
    return dict(zip(rng.permutation(ids).tolist(), counts.tolist(), strict=True))


def read_vocabulary(folder: Path, column: str = "cat_1") -> pl.DataFrame:
    """All rows of a column's files, in the order of the files."""
    frame = pl.concat([pl.read_parquet(path) for path in vocabulary_files(folder, column)])
    assert dict(frame.schema) == {"id": pl.UInt32, "index": pl.Int32, "count": pl.UInt32}
    return frame


def in_order_of_frequency(counts: dict[int, int], threshold: int) -> list[tuple[int, int, int]]:
    kept = [(id_, count) for id_, count in counts.items() if count >= threshold]
    mixed = mixed_of(np.array([id_ for id_, _ in kept], np.uint32)).tolist()
    order = sorted(range(len(kept)), key=lambda i: (-kept[i][1], mixed[i]))
    return [(kept[i][0], FIRST_INDEX + place, kept[i][1]) for place, i in enumerate(order)]


@pytest.mark.parametrize("chunk_entries", [64, 1001, 1 << 22])
@pytest.mark.parametrize("threshold", [1, 2, 3, 50])
def test_the_most_frequent_come_first(threshold, chunk_entries, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "_CHUNK_ENTRIES", chunk_entries)
    counts = random_counts(3000)
    entries_of(counts).tofile(tmp_path / "counts")
    choice = choose_by_frequency(tmp_path / "counts", threshold, tmp_path, "cat_1")
    expected = in_order_of_frequency(counts, threshold)
    assert 0 < len(expected) <= len(counts)
    assert choice == Choice(len(counts), len(expected))
    assert read_vocabulary(tmp_path).sort("index").rows() == expected
    assert len(vocabulary_files(tmp_path, "cat_1")) <= -(-len(counts) // chunk_entries)
    assert (len(vocabulary_files(tmp_path, "cat_1")) > 1) == (chunk_entries < len(counts))
    for path in vocabulary_files(tmp_path, "cat_1"):
        assert pl.read_parquet(path)["index"].is_sorted()


def test_from_ids_to_indices(tmp_path):
    ids = column_of("zipf")
    with (tmp_path / "counts").open("wb") as file:
        for counted in count_column(blocks_of(ids), "frequency", SMALLEST):
            counted.entries.tofile(file)
    choice = choose_by_frequency(tmp_path / "counts", 3, tmp_path, "cat_1")
    expected = in_order_of_frequency(Counter(ids[ids != 0].tolist()), 3)
    assert read_vocabulary(tmp_path).rows() == expected
    assert choice == Choice(len(np.unique(ids[ids != 0])), len(expected))
    index_of = {id_: index for id_, index, _ in expected}
    indices = np.where(ids == 0, MISSING_INDEX, RARE_INDEX).astype(np.int32)
    for table in lookup_tables(vocabulary_files(tmp_path, "cat_1"), None, LARGE):
        table.look_up(ids, indices)
    assert indices.tolist() == [index_of.get(id_, RARE_INDEX) if id_ else MISSING_INDEX for id_ in ids.tolist()]


def test_a_threshold_that_none_reaches(tmp_path):
    entries_of({5: 1, 6: 2}).tofile(tmp_path / "counts")
    np.array([0, 1]).tofile(tmp_path / "first_rows")
    assert choose_by_frequency(tmp_path / "counts", 3, tmp_path, "cat_1") == Choice(2, 0)
    assert choose_by_first_row(tmp_path / "counts", tmp_path / "first_rows", 3, tmp_path, "cat_1", 3, LARGE) == Choice(
        2, 0
    )
    assert vocabulary_files(tmp_path, "cat_1") == []
    assert [table.missing_index for table in lookup_tables([], None, LARGE)] == [MISSING_INDEX]


def test_no_ids_at_all(tmp_path):
    (tmp_path / "counts").touch()
    (tmp_path / "first_rows").touch()
    assert choose_by_frequency(tmp_path / "counts", 1, tmp_path, "cat_1") == Choice(0, 0)
    assert choose_by_first_row(tmp_path / "counts", tmp_path / "first_rows", 1, tmp_path, "cat_1", 5, 100) == Choice(
        0, 0
    )
    assert vocabulary_files(tmp_path, "cat_1") == []


@pytest.mark.parametrize("chunk_entries", [64, 1 << 22])
@pytest.mark.parametrize("memory_bytes", [20_000, LARGE])
@pytest.mark.parametrize("threshold", [1, 2, 50])
def test_the_first_seen_come_first(threshold, memory_bytes, chunk_entries, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "_CHUNK_ENTRIES", chunk_entries)
    # The missing id comes before all others, as `dlrm preprocess --compat torchrec` has it.
    entries = np.concatenate([[np.uint64(70)], entries_of(random_counts(3000))])
    num_rows = len(entries)
    first_rows = np.random.default_rng(1).permutation(num_rows)
    entries.tofile(tmp_path / "counts")
    first_rows.tofile(tmp_path / "first_rows")
    choice = choose_by_first_row(
        tmp_path / "counts", tmp_path / "first_rows", threshold, tmp_path, "cat_1", num_rows, memory_bytes
    )
    ids, values = parts_of(entries[np.argsort(first_rows)])
    kept = [(id_, count) for id_, count in zip(ids.tolist(), values.tolist(), strict=True) if count >= threshold]
    assert choice == Choice(len(entries), len(kept))
    expected = [(id_, FIRST_INDEX + place, count) for place, (id_, count) in enumerate(kept)]
    assert read_vocabulary(tmp_path).rows() == expected
    ranges = {path.name.split(".")[1] for path in vocabulary_files(tmp_path, "cat_1")}
    assert (len(ranges) > 1) == (memory_bytes == 20_000)
    (missing,) = (index for id_, index, _ in expected if id_ == 0)
    tables = list(lookup_tables(vocabulary_files(tmp_path, "cat_1"), None, memory_bytes))
    assert tables[0].missing_index == missing
    assert {table.missing_index for table in tables[1:]} <= {MISSING_INDEX}


def test_names_that_begin_alike(tmp_path):
    entries_of({5: 1}).tofile(tmp_path / "counts")
    for column in ("cat_1", "cat_10", "cat_11"):
        choose_by_frequency(tmp_path / "counts", 1, tmp_path, column)
    assert [path.name for path in vocabulary_files(tmp_path, "cat_1")] == ["cat_1.0000.parquet"]


def write_vocabulary(folder: Path, index_of: dict[int, int], num_files: int) -> list[Path]:
    frame = pl.DataFrame(
        {"id": list(index_of), "index": list(index_of.values())}, schema={"id": pl.UInt32, "index": pl.Int32}
    )
    paths = []
    for i in range(num_files):
        paths.append(folder / f"cat_1.{i:04d}.parquet")
        frame.gather_every(num_files, i).write_parquet(paths[-1])
    return paths


@pytest.mark.parametrize("max_embeddings", [None, 3, 1000, 10**6])
@pytest.mark.parametrize(("num_files", "chunk_entries"), [(1, 1 << 22), (3, 700)])
def test_lookups_in_little_memory(num_files, chunk_entries, max_embeddings, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "_CHUNK_ENTRIES", chunk_entries)
    rng = np.random.default_rng(2)
    index_of = {id_: FIRST_INDEX + place for place, id_ in enumerate(random_counts(20_000))}
    for id_ in EDGES[1:].tolist():
        index_of.setdefault(id_, FIRST_INDEX + len(index_of))
    files = write_vocabulary(tmp_path, index_of, num_files)
    unknown = rng.integers(0, 2**32, 5000, np.uint32)
    ids = rng.permutation(np.concatenate([np.array(list(index_of), np.uint32), unknown, EDGES]))
    before = -np.arange(len(ids), dtype=np.int32) - 1
    expected = [
        before[i] if id_ not in index_of else index_of[id_] % (max_embeddings or 2**31)
        for i, id_ in enumerate(ids.tolist())
    ]
    assert 0 not in index_of
    assert sum(value < 0 for value in expected) > 4900
    for memory_bytes, num_tables in ((LARGE, 1), (100_000, 16)):
        tables = list(lookup_tables(files, max_embeddings, memory_bytes))
        assert len(tables) == num_tables
        assert {table.missing_index for table in tables} == {MISSING_INDEX}
        for some in (tables, reversed(tables)):
            indices = before.copy()
            for table in some:
                table.look_up(ids, indices)
            assert indices.tolist() == expected


def test_each_table_sets_its_own_ids_only(tmp_path):
    index_of = {id_: FIRST_INDEX + place for place, id_ in enumerate(random_counts(5000))}
    files = write_vocabulary(tmp_path, index_of, 2)
    ids = np.array(list(index_of), np.uint32)
    times_set = np.zeros(len(ids), np.int64)
    for table in lookup_tables(files, None, 50_000):
        indices = np.full(len(ids), -1, np.int32)
        table.look_up(ids, indices)
        times_set += indices != -1
    assert (times_set == 1).all()


@pytest.mark.parametrize("prefix_bits", [0, 1, 5])
def test_a_full_run_of_slots_goes_around_the_end(prefix_bits):
    """Keys that all belong into the last slot."""
    ids = unmixed_of((2**32 - 1 - np.arange(40)).astype(np.uint32))
    entries = (mixed_of(ids).astype(np.uint64) << np.uint64(32)) | np.arange(40, dtype=np.uint64)
    slots, nothing = np.zeros(64, np.uint64), np.empty(0, np.int64)
    insert_slots(entries, nothing, slots, nothing, prefix_bits)
    indices = np.full(42, -1, np.int32)
    prefix = (1 << prefix_bits) - 1
    others = unmixed_of(np.array([2**32 - 41, 5]))
    look_up_ids(np.concatenate([ids, others]), slots, prefix_bits, prefix, indices)
    assert indices.tolist() == [*range(40), -1, -1]


def test_entries_are_read_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "_CHUNK_ENTRIES", 10)
    entries = np.arange(25, dtype=np.uint64)
    entries.tofile(tmp_path / "counts")
    chunks = list(read_entries(tmp_path / "counts"))
    assert [len(chunk) for chunk in chunks] == [10, 10, 5]
    np.testing.assert_array_equal(np.concatenate(chunks), entries)


def test_load_entries(tmp_path):
    files = write_vocabulary(tmp_path, {7: 2, 2**32 - 1: 3, 9: 4}, 2)
    ids, indices = parts_of(np.concatenate(list(load_entries(files, None))))
    assert dict(zip(ids.tolist(), indices.tolist(), strict=True)) == {7: 2, 2**32 - 1: 3, 9: 4}
    _, indices = parts_of(np.concatenate(list(load_entries(files, 3))))
    assert sorted(indices.tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    "columns",
    [
        {"id": [5, 6]},
        {"index": [2, 3]},
        {"ID": [5, 6], "index": [2, 3]},
        {"id": ["x", "y"], "index": [2, 3]},
        {"id": [5, -6], "index": [2, 3]},
        {"id": [5, 2**32], "index": [2, 3]},
        {"id": [5, 6], "index": [2, -3]},
        {"id": [5, 6], "index": [2, 2**31]},
        {"id": [5, 6], "index": [2, 2**32 + 3]},
        {"id": [5, None], "index": [2, 3]},
        {"id": [5, 6], "index": [2, None]},
        {"id": [5, 6], "index": [[2], [3]]},
    ],
)
def test_a_parquet_file_that_is_no_vocabulary(columns, tmp_path):
    path = tmp_path / "cat_1.0000.parquet"
    pl.DataFrame(columns).write_parquet(path)
    with pytest.raises(DatasetError, match=r"cat_1\.0000\.parquet: not a vocabulary") as caught:
        list(lookup_tables([path], None, LARGE))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not Parquet", b"PAR1" + b"\0" * 100 + b"PAR1"])
@pytest.mark.parametrize("load", [load_entries, lambda files, most: lookup_tables(files, most, LARGE)])
def test_a_vocabulary_that_is_not_parquet(load, content, tmp_path):
    path = tmp_path / "cat_1.0000.parquet"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"cat_1\.0000\.parquet: not a vocabulary"):
        list(load([path], None))
