"""Shuffled and undersampled training sets, and several ids per feature, through the batches that ranks get."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from dlrm.config.config import Config, DataConfig, ModelConfig, OutputConfig, TrainingConfig
from dlrm.dataset.binary_days import STAGES, Stage
from dlrm.errors import DatasetError
from dlrm.loader.expansion import Companions
from dlrm.loader.run_data import RunData, budget_of, build_splits, draw_run_companions
from dlrm.loader.split import Split
from dlrm.materialize.command import MaterializeConfig, materialize
from dlrm.ranks.runtime import Runtime

TABLE_ROWS = (1000, 3, 50, 70_001) + (20,) * 20 + (1, 400)
SIZES = (3, 1, 2, 7) + (1,) * 20 + (5, 2)
ROWS_PER_DAY = (120, 97, 41)
NUM_TRAIN = 217


def runtime_of(rank: int, world_size: int) -> Runtime:
    return Runtime(rank, rank, world_size, world_size, torch.device("cpu"))


def config_of(folder, *, seed: int = 1, table_rows=TABLE_ROWS, **data: object) -> Config:
    return Config(
        data=DataConfig(**({"in_memory_binary_criteo_path": str(folder)} if folder else {}), **data),
        model=ModelConfig(num_embeddings_per_feature=table_rows),
        training=TrainingConfig(seed=seed),
        output=OutputConfig(print_progress=False),
    )


def open_splits_of(config: Config, runtime: Runtime) -> dict[Stage, Split]:
    """As a run does, with companions that were drawn by a host's one rank."""
    data = RunData.open(config)
    return build_splits(data, runtime, draw_companions(data, runtime))


def draw_companions(data: RunData, runtime: Runtime) -> Companions | None:
    """As the one rank of a host does."""
    alone = dataclasses.replace(runtime, rank=0, world_size=1, local_world_size=1)
    return draw_run_companions(data, alone, budget_of(alone))


def steps_of(config: Config, world_size: int, stage: str = "train", epoch: int = 0) -> list[list]:
    """Batches of each step, rank by rank."""
    ranks = [open_splits_of(config, runtime_of(rank, world_size)) for rank in range(world_size)]
    return list(zip(*(splits[stage].batches(epoch) for splits in ranks), strict=True))


def rows_of(batches) -> list[int]:
    """Numbers of real rows, which `write_days` wrote into the first integer."""
    return [int(row) for batch in batches for row in batch.dense_BI[: batch.span.rows, 0]]


def ids_of(batches) -> list[np.ndarray]:
    """Ids of each feature, [rows, hotness]."""
    parts = []
    for batch in batches:
        parts.append([batch.sparse_features[f"cat_{i}"].values().reshape(batch.span.rows, -1) for i in range(26)])
    return [torch.cat(column).numpy() for column in zip(*parts, strict=True)]


@pytest.fixture
def days(tmp_path, write_days):
    """The folder, and all that is in it."""
    return tmp_path / "days", write_days(tmp_path / "days", ROWS_PER_DAY, max_id=5_000_000)


@pytest.fixture
def multi_hot(days):
    """A folder of multi-hot days, as `dlrm materialize` writes it."""
    folder = days[0].parent / "multi_hot"
    materialize(
        MaterializeConfig(str(days[0]), str(folder), multi_hot_sizes=SIZES, num_embeddings_per_feature=TABLE_ROWS)
    )
    return folder


@pytest.mark.parametrize("mmap_mode", [False, True])
@pytest.mark.parametrize("undersampling_rate", [None, 0.5])
def test_a_shuffled_step_holds_the_same_rows_whatever_the_world_size(undersampling_rate, mmap_mode, days):
    folder, written = days
    data = {"shuffle_training_set": True, "undersampling_rate": undersampling_rate, "mmap_mode": mmap_mode}
    for epoch in (0, 2):
        seen = {}
        for world_size, batch_size in ((1, 12), (2, 6), (3, 4), (1, 12)):
            steps = steps_of(config_of(folder, batch_size=batch_size, **data), world_size, epoch=epoch)
            assert seen.setdefault(epoch, [sorted(rows_of(step)) for step in steps]) == [
                sorted(rows_of(step)) for step in steps
            ]
            for batch in (batch for step in steps for batch in step if batch.span.rows):
                rows = rows_of([batch])
                np.testing.assert_array_equal(batch.dense_BI[: batch.span.rows], written.dense_BI[rows])
                np.testing.assert_array_equal(batch.labels_B[: batch.span.rows], written.labels_B[rows])
                np.testing.assert_array_equal(np.hstack(ids_of([batch])), written.ids_BN[rows] % TABLE_ROWS)
        everything = sorted(row for rows in seen[epoch] for row in rows)
        assert len(set(everything)) == len(everything)
        if undersampling_rate is None:
            assert everything == list(range(NUM_TRAIN))
        else:
            labels = written.labels_B[:NUM_TRAIN]
            assert set(np.flatnonzero(labels)) <= set(everything)
            assert 0.3 < 1 - (NUM_TRAIN - len(everything)) / (labels == 0).sum() < 0.7


def test_epochs_and_seeds_shuffle_differently_and_held_out_sets_stay(days):
    shuffled = config_of(days[0], batch_size=10, shuffle_training_set=True)
    orders = [[rows_of(step) for step in steps_of(shuffled, 1, epoch=epoch)] for epoch in (0, 1)]
    other = dataclasses.replace(shuffled, training=TrainingConfig(seed=2))
    orders.append([rows_of(step) for step in steps_of(other, 1)])
    orders.append([rows_of(step) for step in steps_of(config_of(days[0], batch_size=10), 1)])
    assert all(set(orders[i][0]) != set(orders[j][0]) for i in range(4) for j in range(i))
    for stage in ("val", "test"):
        plain = steps_of(config_of(days[0], batch_size=10), 1, stage)
        assert [rows_of(step) for step in steps_of(shuffled, 1, stage)] == [rows_of(step) for step in plain]


def test_shuffling_batches_permutes_what_shuffling_the_set_gave(days):
    set_only = steps_of(config_of(days[0], batch_size=50, shuffle_training_set=True), 2)
    both = steps_of(config_of(days[0], batch_size=50, shuffle_training_set=True, shuffle_batches=True), 2)
    for first, second in zip(set_only, both, strict=True):
        assert [sorted(rows_of([batch])) for batch in first] == [sorted(rows_of([batch])) for batch in second]
        assert rows_of(first) != rows_of(second)


@pytest.mark.parametrize("undersampling_rate", [None, 0.9])
def test_a_bad_row_is_named_by_its_true_number(undersampling_rate, days):
    for part, value, words in (
        ("dense", np.nan, "day_1_dense.npy: nan at row 60, column 3"),
        ("sparse", -7, "day_1_sparse.npy: id -7 at row 60, column 3"),
    ):
        path = days[0] / f"day_1_{part}.npy"
        good = np.load(path)
        bad = good.copy()
        bad[60, 3] = value
        np.save(path, bad)
        labels = np.load(days[0] / "day_1_labels.npy")
        labels[60] = 1  # so that it stays
        np.save(days[0] / "day_1_labels.npy", labels)
        config = config_of(days[0], batch_size=20, shuffle_training_set=True, undersampling_rate=undersampling_rate)
        with pytest.raises(DatasetError, match=words):
            steps_of(config, 1)
        np.save(path, good)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_undersampled_rows_are_the_same_in_memory_and_mapped(world_size, days):
    folder, written = days
    data = {"batch_size": 12 // world_size, "undersampling_rate": 0.4}
    loaded = steps_of(config_of(folder, **data), world_size)
    mapped = steps_of(config_of(folder, mmap_mode=True, **data), world_size)
    assert [rows_of(step) for step in loaded] == [rows_of(step) for step in mapped]
    rows = [row for step in loaded for row in rows_of(step)]
    alone = steps_of(config_of(folder, batch_size=12, undersampling_rate=0.4), 1)
    assert rows == [row for step in alone for row in rows_of(step)] == sorted(rows)
    splits = build_splits(RunData.open(config_of(folder, **data)), runtime_of(0, world_size))
    assert splits["train"].partition.num_rows == len(rows) < NUM_TRAIN
    assert [splits[stage].partition.num_rows for stage in ("val", "test")] == [21, 20]
    assert (written.labels_B[rows] == 1).sum() == (written.labels_B[:NUM_TRAIN] == 1).sum()


@pytest.mark.parametrize("distribution", ["uniform", "pareto"])
@pytest.mark.parametrize("mmap_mode", [False, True])
@pytest.mark.parametrize("shuffles", [False, True])
def test_ids_made_on_the_fly_are_those_of_materialized_days(shuffles, mmap_mode, distribution, days):
    folder = days[0].parent / "multi_hot"
    materialize(
        MaterializeConfig(*(str(days[0]), str(folder), SIZES, TABLE_ROWS), multi_hot_distribution_type=distribution)
    )
    common = {"batch_size": 20, "mmap_mode": mmap_mode, "shuffle_batches": shuffles, "shuffle_training_set": shuffles}
    common["undersampling_rate"] = 0.7
    made = config_of(days[0], multi_hot_sizes=SIZES, multi_hot_distribution_type=distribution, **common)
    read = config_of(days[0], synthetic_multi_hot_criteo_path=str(folder), **common)
    for stage in STAGES:
        for first, second in zip(steps_of(made, 2, stage), steps_of(read, 2, stage), strict=True):
            for ours, theirs in zip(first, second, strict=True):
                assert torch.equal(ours.sparse_features.values(), theirs.sparse_features.values())
                assert ours.sparse_features.length_per_key() == theirs.sparse_features.length_per_key()
                assert torch.equal(ours.dense_BI, theirs.dense_BI)
                assert ours.sparse_features.length_per_key() == [ours.span.rows * size for size in SIZES]


def test_sizes_of_one_are_one_hot(days):
    folder = days[0].parent / "multi_hot"
    ones = (1,) * 26
    materialize(MaterializeConfig(str(days[0]), str(folder), ones, TABLE_ROWS))
    plain = steps_of(config_of(days[0], batch_size=20), 1)
    for data in ({"multi_hot_sizes": ones}, {"synthetic_multi_hot_criteo_path": str(folder)}):
        for first, second in zip(plain, steps_of(config_of(days[0], batch_size=20, **data), 1), strict=True):
            assert torch.equal(first[0].sparse_features.values(), second[0].sparse_features.values())


def test_a_folder_with_all_three_parts_needs_no_other(days, multi_hot):
    """As the public example's script leaves it."""
    for path in days[0].glob("*.npy"):
        if "sparse" not in path.name:
            shutil.copy(path, multi_hot)
    (multi_hot / "manifest.json").unlink()
    whole = steps_of(config_of(None, batch_size=20, synthetic_multi_hot_criteo_path=str(multi_hot)), 1)
    apart = steps_of(config_of(days[0], batch_size=20, synthetic_multi_hot_criteo_path=str(multi_hot)), 1)
    for first, second in zip(whole, apart, strict=True):
        assert torch.equal(first[0].sparse_features.values(), second[0].sparse_features.values())
        assert torch.equal(first[0].dense_BI, second[0].dense_BI)


def test_criteo_kaggle_of_several_ids(tmp_path, write_days):
    written = write_days(tmp_path / "days", [70], names=["train"])
    materialize(MaterializeConfig(str(tmp_path / "days"), str(tmp_path / "multi_hot"), SIZES, TABLE_ROWS))
    (tmp_path / "days" / "train_sparse.npy").unlink()
    config = config_of(
        tmp_path / "days",
        batch_size=8,
        dataset_name="criteo_kaggle",
        synthetic_multi_hot_criteo_path=str(tmp_path / "multi_hot"),
    )
    ids = ids_of([batch for step in steps_of(config, 2) for batch in step])
    for feature in range(26):
        np.testing.assert_array_equal(ids[feature][:, 0], written.ids_BN[:60, feature] % TABLE_ROWS[feature])
        assert ids[feature].shape == (60, SIZES[feature])


def test_ids_outside_smaller_tables_are_reduced(days, multi_hot):
    (multi_hot / "manifest.json").unlink()
    smaller = tuple(max(1, rows // 2) for rows in TABLE_ROWS)
    path = {"synthetic_multi_hot_criteo_path": str(multi_hot), "batch_size": 50}
    full = ids_of([batch for step in steps_of(config_of(days[0], **path), 1) for batch in step])
    for mmap_mode in (False, True):
        config = config_of(days[0], table_rows=smaller, mmap_mode=mmap_mode, **path)
        folded = ids_of([batch for step in steps_of(config, 1) for batch in step])
        for feature, rows in enumerate(smaller):
            np.testing.assert_array_equal(folded[feature], full[feature] % rows)


def save_day(multi_hot, day: int, change) -> None:
    path = multi_hot / f"day_{day}_sparse_multi_hot.npz"
    with np.load(path) as file:
        arrays = change({name: file[name] for name in file.files})
    np.savez(path, **arrays)
    (multi_hot / "manifest.json").unlink(missing_ok=True)


def replaced(name: str, change):
    return lambda arrays: {**arrays, name: change(arrays[name])}


def negative(array: np.ndarray) -> np.ndarray:
    array[4, 5] = -3
    return array


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "day_1_sparse_multi_hot.npz").unlink(), "day_1_sparse_multi_hot.npz: missing"),
        (lambda f: shutil.rmtree(f), "multi_hot: no such folder"),
        (lambda f: save_day(f, 1, replaced("3", lambda a: a[:-1])), "day_1_sparse_multi_hot.npz: 96 rows, expected 97"),
        (lambda f: save_day(f, 1, lambda a: {k: v[:-1] for k, v in a.items()}), "96 rows, expected 97 as in day_1_de"),
        (lambda f: save_day(f, 0, replaced("9", lambda a: a.astype(np.int64))), "member 9 is int64 .*expected int32"),
        (lambda f: save_day(f, 0, replaced("3", np.asfortranarray)), "member 3 is .* in row order"),
        (lambda f: save_day(f, 0, replaced("3", np.ravel)), r"member 3 is int32 \[840\]"),
        (lambda f: save_day(f, 2, lambda a: {k: v for k, v in a.items() if k != "25"}), "25.npy"),
        (lambda f: save_day(f, 1, replaced("0", lambda a: a[:, :2])), "2,1,2,7.* ids per feature, expected 3,1,2,7"),
        (lambda f: save_day(f, 1, replaced("3", negative)), "id -3 at row 4, column 5 of member 3"),
        (lambda f: (f / "day_0_sparse_multi_hot.npz").write_bytes(b"PK"), "2 bytes, expected .* as manifest.json"),
    ],
)
def test_multi_hot_days_that_are_wrong(spoil, words, days, multi_hot):
    spoil(multi_hot)
    with pytest.raises(DatasetError, match=words) as caught:
        steps_of(config_of(days[0], synthetic_multi_hot_criteo_path=str(multi_hot)), 1)
    assert "\n" not in str(caught.value)


def test_compressed_and_cut_multi_hot_days(days, multi_hot):
    (multi_hot / "manifest.json").unlink()
    path = multi_hot / "day_1_sparse_multi_hot.npz"
    content = path.read_bytes()
    with np.load(path) as file:
        np.savez_compressed(path, **{name: file[name] for name in file.files})
    config = config_of(days[0], synthetic_multi_hot_criteo_path=str(multi_hot))
    with pytest.raises(DatasetError, match="member 0 is compressed, so it can't be mapped"):
        build_splits(RunData.open(config), runtime_of(0, 1))
    for cut in (content[:-100], content[: len(content) // 2], b""):
        path.write_bytes(cut)
        with pytest.raises(DatasetError, match=r"day_1_sparse_multi_hot.npz: not a multi-hot day"):
            build_splits(RunData.open(config), runtime_of(0, 1))


def test_a_manifest_of_other_tables_and_other_sizes_are_refused(days, multi_hot):
    path = {"synthetic_multi_hot_criteo_path": str(multi_hot)}
    with pytest.raises(DatasetError, match=r"manifest.json: ids were drawn for tables of 1000,3,50,.* expected 7,7,7"):
        build_splits(RunData.open(config_of(days[0], table_rows=(7,) * 26, **path)), runtime_of(0, 1))
    config = config_of(days[0], multi_hot_sizes=(2,) * 26, **path)
    with pytest.raises(DatasetError, match=r"3,1,2,7,.* expected 2,2,.* as --multi_hot_sizes says"):
        build_splits(RunData.open(config), runtime_of(0, 1))
    with pytest.raises(DatasetError, match=r"expected 2,2,.* as --multi_hot_sizes \(or the recipe mlperf_v2\) says"):
        build_splits(RunData.open(dataclasses.replace(config, recipe="mlperf_v2")), runtime_of(0, 1))
    build_splits(RunData.open(config_of(days[0], multi_hot_sizes=SIZES, **path)), runtime_of(0, 1))


def test_ids_of_other_days_are_refused(days, tmp_path):
    """Rows are matched by their number: ids of another order would go to other labels."""
    manifest = days[0] / "manifest.json"
    manifest.write_text('{"version": 1, "files": {}, "seed": 0}')
    folder = tmp_path / "made"
    materialize(
        MaterializeConfig(str(days[0]), str(folder), multi_hot_sizes=SIZES, num_embeddings_per_feature=TABLE_ROWS)
    )
    config = config_of(days[0], synthetic_multi_hot_criteo_path=str(folder))
    build_splits(RunData.open(config), runtime_of(0, 1))
    manifest.write_text('{"version": 1, "files": {}, "seed": 7}')
    with pytest.raises(DatasetError, match=r"made/manifest.json: ids were made from other days than those in"):
        build_splits(RunData.open(config), runtime_of(0, 1))


def test_random_data_with_a_distribution_has_the_companions_of_its_ids():
    sizes = (3, 2) + (1,) * 24
    config = config_of(None, batch_size=50, multi_hot_sizes=sizes, multi_hot_distribution_type="uniform")
    ids = ids_of([batch for step in steps_of(config, 1) for batch in step])
    companions = {}
    for row in ids[1].tolist():
        assert companions.setdefault(row[0], row[1]) == row[1]
    assert len(companions) == TABLE_ROWS[1]
    free = ids_of([b for s in steps_of(config_of(None, batch_size=50, multi_hot_sizes=sizes), 1) for b in s])
    assert len({tuple(row) for row in free[1].tolist()}) > len(companions)


def test_memory_is_counted_before_it_is_taken(days):
    data = {"multi_hot_sizes": SIZES, "batch_size": 10, "mmap_mode": True}
    tables = 4 * sum(rows * (size - 1) for rows, size in zip(TABLE_ROWS, SIZES, strict=True))
    counts = 16 * sum(TABLE_ROWS)

    def open_with(num_bytes: int, world_size: int = 1, **more: object) -> None:
        runtime = dataclasses.replace(runtime_of(0, world_size), host_memory_bytes=num_bytes)
        open_splits_of(config_of(days[0], **{**data, **more}), runtime)

    open_with(tables)
    open_with(2 * tables, world_size=2)
    with pytest.raises(
        DatasetError, match=r"--multi_hot_sizes: .* of companions a host.*dlrm materialize.*--synthetic_"
    ):
        open_with(tables - 1)
    open_with(tables + counts, collect_multi_hot_freqs_stats=True)
    with pytest.raises(DatasetError, match=r"--collect_multi_hot_freqs_stats: .* of counts a rank"):
        open_with(tables + counts - 1, collect_multi_hot_freqs_stats=True)
    rows = 160 * sum(ROWS_PER_DAY)
    open_with(tables + rows, mmap_mode=False)
    with pytest.raises(DatasetError, match="B of rows a rank"):
        open_with(tables + rows - 160, mmap_mode=False)
    open_with(tables + 160 * ROWS_PER_DAY[-1], mmap_mode=False, shuffle_training_set=True)


def test_headers_are_checked_before_companions_are_drawn(days, monkeypatch):
    config = config_of(days[0], multi_hot_sizes=SIZES)
    data = RunData.open(config)
    companions = draw_companions(data, runtime_of(0, 1))
    assert [table.shape for table in companions.tables] == list(
        zip(TABLE_ROWS, [size - 1 for size in SIZES], strict=True)
    )
    splits = build_splits(data, runtime_of(0, 1), companions)
    assert all(splits[stage].source.companions is companions for stage in STAGES)
    (days[0] / "day_1_dense.npy").unlink()
    monkeypatch.setattr("dlrm.loader.expansion.draw_table", None)
    with pytest.raises(DatasetError, match=r"day_1_dense.npy: missing"):
        open_splits_of(config, runtime_of(0, 1))


@pytest.mark.parametrize("data", [{}, {"multi_hot_sizes": (1,) * 26}, {"synthetic_multi_hot_criteo_path": "d"}])
def test_no_companions_where_none_are_needed(data, days):
    assert RunData(config_of(days[0], **data), STAGES, {}).expansion is None
    assert RunData.open(config_of(None, multi_hot_sizes=SIZES)).expansion is None


def test_counts_are_those_of_what_was_taken(days):
    config = config_of(days[0], batch_size=10, multi_hot_sizes=SIZES, collect_multi_hot_freqs_stats=True)
    runtime = runtime_of(0, 1)
    split = open_splits_of(config, runtime)["train"]
    taken = list(split.batches())[:7]
    for batch in taken:
        split.frequencies.count(batch)
    taken = ids_of(taken)
    arrays = split.frequencies.total(runtime)
    assert len(arrays) == 52
    for feature, (ids, rows) in enumerate(zip(taken, TABLE_ROWS, strict=True)):
        before, after = arrays[f"before_cat_{feature}"], arrays[f"after_cat_{feature}"]
        np.testing.assert_array_equal(before, np.bincount(ids[:, 0], minlength=rows))
        np.testing.assert_array_equal(after, np.bincount(ids.ravel(), minlength=rows))
    assert open_splits_of(config, runtime)["val"].frequencies is None


@pytest.mark.parametrize("mmap_mode", [False, True])
@pytest.mark.parametrize("knobs", [{}, {"shuffle_training_set": True}, {"undersampling_rate": 0.6}])
def test_a_pass_that_goes_on_at_other_world_sizes_takes_each_row_once(knobs, mmap_mode, days):
    """Batches in memory hold the rows of a pass from the start; what they lack is read where it lies."""
    folder, written = days
    knobs = {**knobs, "mmap_mode": mmap_mode}
    whole = [rows_of(step) for step in steps_of(config_of(folder, batch_size=9, **knobs), 1, epoch=1)]
    seen, row, step = [], 0, 0
    for world_size, batch_size, steps in ((2, 6, 5), (1, 7, 4), (3, 5, 2), (2, 6, 1), (4, 3, None)):
        config = config_of(folder, batch_size=batch_size, **knobs)
        splits = [
            open_splits_of(config, runtime_of(rank, world_size))["train"].resumed(row, step)
            for rank in range(world_size)
        ]
        for taken, batches in enumerate(zip(*(split.batches(1) for split in splits), strict=True)):
            if taken == steps:
                break
            for batch in batches:
                rows = rows_of([batch])
                np.testing.assert_array_equal(batch.labels_B[: batch.span.rows], written.labels_B[rows])
            seen += rows_of(batches)
            step += 1
        row = splits[0].partition.rows_before(step)
        assert row == len(seen)
    assert sorted(seen) == sorted(row for rows in whole for row in rows)
    assert len(set(seen)) == len(seen)
