import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from dlrm.config.config import Config, DataConfig, ModelConfig, TrainingConfig
from dlrm.dataset.binary_days import STAGES
from dlrm.errors import DatasetError
from dlrm.loader.prefetch import prefetch
from dlrm.loader.run_data import RunData, build_splits
from dlrm.loader.sources import MappedSource, MemorySource
from dlrm.loader.split import Split
from dlrm.ranks.runtime import Runtime, derive_seed

TABLE_ROWS = (2**31 - 1, 2**24 + 3, 1000, 7, 1) + (50,) * 21
NUM_TRAIN, NUM_VAL, NUM_TEST = 23, 7, 6


def runtime_of(rank: int, world_size: int, *, ranks_per_host: int | None = None, device: str = "cpu") -> Runtime:
    local_world_size = ranks_per_host or world_size
    return Runtime(rank, rank % local_world_size, world_size, local_world_size, torch.device(device))


def config_of(path=None, *, seed: int = 1, **data: object) -> Config:
    folder = None if path is None else str(path)
    return Config(
        data=DataConfig(in_memory_binary_criteo_path=folder, **data),
        model=ModelConfig(num_embeddings_per_feature=TABLE_ROWS),
        training=TrainingConfig(seed=seed),
    )


def open_ranks(config: Config, world_size: int) -> list[dict[str, Split]]:
    return [build_splits(RunData.open(config), runtime_of(rank, world_size)) for rank in range(world_size)]


def rows_of(batch) -> list[int]:
    """Numbers of a batch's real rows, which `write_days` wrote into the first integer."""
    return batch.dense_BI[: batch.span.rows, 0].int().tolist()


def ids_of(batch) -> np.ndarray:
    return batch.sparse_features.values().reshape(26, batch.span.rows).T.numpy()


def assert_same(first, second) -> None:
    assert torch.equal(first.dense_BI, second.dense_BI)
    assert torch.equal(first.labels_B, second.labels_B)
    assert torch.equal(first.sparse_features.values(), second.sparse_features.values())
    assert torch.equal(first.sparse_features.lengths(), second.sparse_features.lengths())
    assert first.span == second.span


@pytest.fixture
def days(tmp_path, write_days):
    """The folder, and all that is in it."""
    return tmp_path, write_days(tmp_path, [12, 11, 13], sparse_dtype=np.int64, max_id=2**40)


@pytest.mark.parametrize("mmap_mode", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_row_reaches_one_rank_once_and_whole(world_size, mmap_mode, days):
    folder, written = days
    config = config_of(folder, batch_size=4, test_batch_size=2, mmap_mode=mmap_mode)
    ranks = open_ranks(config, world_size)
    first = 0
    for stage, num_rows in zip(STAGES, (NUM_TRAIN, NUM_VAL, NUM_TEST), strict=True):
        seen = []
        for step in zip(*(splits[stage].batches() for splits in ranks), strict=True):
            assert len({len(batch.labels_B) for batch in step}) == 1
            assert {batch.span.global_rows for batch in step} == {sum(batch.span.rows for batch in step)}
            for batch in step:
                rows = rows_of(batch)
                seen += rows
                np.testing.assert_array_equal(ids_of(batch), written.ids_BN[rows] % TABLE_ROWS)
                np.testing.assert_array_equal(batch.labels_B[: batch.span.rows], written.labels_B[rows])
                np.testing.assert_array_equal(batch.dense_BI[: batch.span.rows], written.dense_BI[rows])
        assert seen == list(range(first, first + num_rows))
        first += num_rows


@pytest.mark.parametrize("drop_last_training_batch", [False, True])
@pytest.mark.parametrize("shuffle_batches", [False, True])
def test_memory_and_mmap_give_the_same_batches(shuffle_batches, drop_last_training_batch, days):
    config = config_of(
        days[0], batch_size=5, shuffle_batches=shuffle_batches, drop_last_training_batch=drop_last_training_batch
    )
    mapped_config = replace(config, data=replace(config.data, mmap_mode=True))
    for rank in range(2):
        loaded, mapped = (build_splits(RunData.open(each), runtime_of(rank, 2)) for each in (config, mapped_config))
        for stage in STAGES:
            assert isinstance(loaded[stage].source, MemorySource)
            assert isinstance(mapped[stage].source, MappedSource)
            for pair in zip(loaded[stage].batches(1), mapped[stage].batches(1), strict=True):
                assert_same(*pair)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_a_rank_holds_its_own_rows_only(world_size, days):
    ranks = open_ranks(config_of(days[0], batch_size=2), world_size)
    for stage, num_rows in zip(STAGES, (NUM_TRAIN, NUM_VAL, NUM_TEST), strict=True):
        held = [splits[stage].source.rows.dense_BI[:, 0].astype(int).tolist() for splits in ranks]
        assert sum(map(len, held)) == num_rows
        assert max(map(len, held)) <= -(-num_rows // world_size)
        for rows, splits in zip(held, ranks, strict=True):
            assert rows == [row for batch in splits[stage].batches() for row in rows_of(batch)]


@pytest.mark.parametrize("mmap_mode", [False, True])
def test_rows_are_picked_by_global_rank(mmap_mode, days):
    """Two hosts of two ranks: by local rank, both hosts would train on the same rows."""
    config = config_of(days[0], batch_size=3, mmap_mode=mmap_mode)
    for rank in range(4):
        splits = build_splits(RunData.open(config), runtime_of(rank, 4, ranks_per_host=2))
        assert rows_of(next(iter(splits["train"].batches()))) == [3 * rank, 3 * rank + 1, 3 * rank + 2]
    random = [build_splits(RunData.open(config_of()), runtime_of(rank, 4, ranks_per_host=2)) for rank in range(4)]
    firsts = [next(iter(splits["train"].batches())).dense_BI for splits in random]
    assert len(torch.cat(firsts).unique(dim=0)) == 4 * 32


def test_sizes_and_limits(days):
    config = config_of(
        days[0], batch_size=3, test_batch_size=2, limit_train_batches=2, limit_val_batches=1, limit_test_batches=5
    )
    splits = build_splits(RunData.open(config), runtime_of(0, 2))
    assert [len(batch.labels_B) for batch in splits["train"].batches()] == [3, 3]
    assert [len(batch.labels_B) for batch in splits["val"].batches()] == [2]
    assert [len(batch.labels_B) for batch in splits["test"].batches()] == [2, 1]
    splits = build_splits(
        RunData.open(config_of(days[0], batch_size=3, drop_last_training_batch=True)), runtime_of(0, 2)
    )
    assert [batch.span.global_rows for batch in splits["train"].batches()] == [6, 6, 6]
    assert [batch.span.global_rows for batch in splits["val"].batches()] == [6, 1]


def test_a_training_set_that_fills_no_batch_is_refused(days):
    fits = config_of(days[0], batch_size=11, drop_last_training_batch=True)
    assert len(list(build_splits(RunData.open(fits), runtime_of(0, 2))["train"].batches())) == 1
    config = config_of(days[0], batch_size=12, drop_last_training_batch=True)
    with pytest.raises(DatasetError, match=f"{days[0]}: 23 training rows fill no batch of 24 over all ranks"):
        build_splits(RunData.open(config), runtime_of(0, 2))


def test_rows_beyond_the_hosts_memory_are_refused_before_they_are_loaded(days):
    """36 rows of 160 bytes over 3 ranks of 2 to a host: 1,920 bytes each, so a host needs twice that."""
    needed = 36 * 160 // 3 * 2
    runtime = runtime_of(1, 3, ranks_per_host=2)
    build_splits(RunData.open(config_of(days[0], batch_size=4)), replace(runtime, host_memory_bytes=needed))
    tight = replace(runtime, host_memory_bytes=needed - 2)
    with pytest.raises(DatasetError, match=f"{days[0]}: .*B of rows a rank, .* Use --mmap_mode"):
        build_splits(RunData.open(config_of(days[0], batch_size=4)), tight)
    build_splits(RunData.open(config_of(days[0], batch_size=4, mmap_mode=True)), tight)


def test_shuffle_permutes_within_each_batch(days):
    plain = build_splits(RunData.open(config_of(days[0], batch_size=8)), runtime_of(1, 2))
    shuffled = build_splits(RunData.open(config_of(days[0], batch_size=8, shuffle_batches=True)), runtime_of(1, 2))
    again = build_splits(RunData.open(config_of(days[0], batch_size=8, shuffle_batches=True)), runtime_of(1, 2))
    other = build_splits(RunData.open(config_of(days[0], batch_size=8, shuffle_batches=True, seed=2)), runtime_of(1, 2))
    written = days[1]
    orders = []
    for epoch in range(2):
        order = [rows_of(batch) for batch in shuffled["train"].batches(epoch)]
        assert [sorted(rows) for rows in order] == [rows_of(batch) for batch in plain["train"].batches(epoch)]
        assert [rows_of(batch) for batch in again["train"].batches(epoch)] == order
        orders.append(order)
    orders.append([rows_of(batch) for batch in other["train"].batches()])
    orders.append([rows_of(batch) for batch in plain["train"].batches()])
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    for batch in shuffled["train"].batches():  # a row's parts stay together
        np.testing.assert_array_equal(ids_of(batch), written.ids_BN[rows_of(batch)] % TABLE_ROWS)
        np.testing.assert_array_equal(batch.labels_B[: batch.span.rows], written.labels_B[rows_of(batch)])
    for stage in ("val", "test"):
        for each in (shuffled, other):
            for pair in zip(plain[stage].batches(), each[stage].batches(), strict=True):
                assert_same(*pair)


def test_random_splits_have_10_batches_unless_limited():
    splits = build_splits(
        RunData.open(config_of(batch_size=8, test_batch_size=4, limit_val_batches=3)), runtime_of(0, 2)
    )
    sizes = {stage: [len(batch.labels_B) for batch in splits[stage].batches()] for stage in STAGES}
    assert sizes == {"train": [8] * 10, "val": [4] * 3, "test": [4] * 10}


def test_random_rows_do_not_depend_on_the_world_size():
    alone = build_splits(RunData.open(config_of(batch_size=12)), runtime_of(0, 1))
    ranks = open_ranks(config_of(batch_size=3), 4)
    for stage in STAGES:
        for whole, *parts in zip(alone[stage].batches(1), *(splits[stage].batches(1) for splits in ranks), strict=True):
            assert torch.equal(torch.cat([part.dense_BI for part in parts]), whole.dense_BI)
            assert torch.equal(torch.cat([part.labels_B for part in parts]), whole.labels_B)
            np.testing.assert_array_equal(np.concatenate([ids_of(part) for part in parts]), ids_of(whole))


def test_random_rows_are_fresh_in_every_step_epoch_and_split():
    splits = build_splits(RunData.open(config_of(batch_size=8)), runtime_of(0, 1))
    dense = [batch.dense_BI for stage in STAGES for epoch in range(2) for batch in splits[stage].batches(epoch)]
    assert len(torch.cat(dense).unique(dim=0)) == 3 * 2 * 10 * 8
    repeated = build_splits(RunData.open(config_of(batch_size=8)), runtime_of(0, 1))
    assert torch.equal(torch.cat([batch.dense_BI for batch in repeated["train"].batches()]), torch.cat(dense[:10]))


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (2, 8), (1, 3)])
def test_generated_batches_come_round(world_size, batch_size):
    ranks = open_ranks(config_of(batch_size=batch_size, num_generated_batches=3), world_size)
    of_ranks = [[*splits["train"].batches(0), *splits["train"].batches(1)] for splits in ranks]
    dense = torch.cat([batch.dense_BI for batches in of_ranks for batch in batches])
    assert len(dense.unique(dim=0)) == 3 * batch_size * world_size
    for batches in of_ranks:
        for earlier, later in zip(batches, batches[3:], strict=False):
            assert_same(earlier, later)


def test_multi_hot_random_batches():
    hotness = (3, 1, 2) + (1,) * 23
    batch = next(
        iter(
            build_splits(RunData.open(config_of(batch_size=4, multi_hot_sizes=hotness)), runtime_of(0, 1))[
                "val"
            ].batches()
        )
    )
    assert batch.sparse_features.length_per_key() == [4 * size for size in hotness]
    ids = batch.sparse_features["cat_2"].values()
    assert len(ids) == 8
    assert int(ids.max()) < TABLE_ROWS[2]


@pytest.mark.parametrize(
    ("pin_memory", "device", "pins"), [(True, "cuda", True), (True, "cpu", False), (False, "cuda", False)]
)
def test_memory_is_pinned_for_a_gpu_only(pin_memory, device, pins, days):
    for path in (None, days[0]):
        splits = build_splits(RunData.open(config_of(path, pin_memory=pin_memory)), runtime_of(0, 1, device=device))
        assert [splits[stage].pin_memory for stage in STAGES] == [pins] * 3


@pytest.fixture
def builders():
    """A function that lists the threads that this test has started and that still run."""
    before = set(threading.enumerate())
    return lambda: [thread.name for thread in threading.enumerate() if thread not in before]


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_prefetch_keeps_the_order(depth, builders):
    assert list(prefetch(iter(range(50)), depth)) == list(range(50))
    assert list(prefetch(iter([]), depth)) == []
    assert builders() == []


@pytest.mark.parametrize("error", [ValueError("at item 2"), SystemExit(3)])
def test_prefetch_hands_on_exceptions(error, builders):
    def items():
        yield from (0, 1)
        raise error

    received = []
    with pytest.raises(type(error)) as caught:
        received.extend(prefetch(items(), 4))
    assert caught.value is error
    ahead = prefetch(items(), 4)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(type(error)):
        next(ahead)
    assert builders() == []


def test_prefetch_builds_ahead_but_no_further_than_its_depth():
    built = []

    def items():
        for i in range(100):
            built.append(i)
            yield i

    ahead = prefetch(items(), 3)
    assert next(ahead) == 0
    deadline = time.monotonic() + 60
    while len(built) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert 4 <= len(built) <= 5  # the one in hand, three ready, and one that waits for its place
    ahead.close()


def test_prefetch_leaves_the_consumer_alone_once_it_has_taken_a_batch(monkeypatch):
    monkeypatch.setattr("dlrm.loader.prefetch._SECONDS_OF_GRACE", 0)
    built = []

    def items():
        for i in range(100):
            built.append(i)
            yield i

    ahead = prefetch(items(), 2)
    deadline = time.monotonic() + 60
    assert next(ahead) == 0
    while len(built) < 4 and time.monotonic() < deadline:  # the one in hand, two ready, one that waits for its place
        time.sleep(0.01)
    monkeypatch.setattr("dlrm.loader.prefetch._SECONDS_OF_GRACE", 3600)
    assert next(ahead) == 1
    time.sleep(0.1)
    assert len(built) == 4
    ahead.close()


@pytest.mark.parametrize("taken", [1, 5])
def test_prefetch_ends_its_thread_when_the_consumer_stops_early(taken, builders):
    endless = iter(int, 1)
    ahead = prefetch(endless, 2)
    assert [next(ahead) for _ in range(taken)] == [0] * taken
    assert builders() == ["batch-builder"]
    ahead.close()
    assert builders() == []


def test_prefetch_ends_its_thread_when_the_consumer_fails(builders):
    def consume():
        for _ in prefetch(iter(int, 1), 2):
            raise KeyError("consumer")

    with pytest.raises(KeyError):
        consume()
    assert builders() == []


def test_seeds_of_different_purposes_differ():
    seeds = [
        derive_seed(seed, purpose, rank, epoch)
        for seed in (0, 1)
        for purpose in ("shuffle_batches", "random")
        for rank in range(12)
        for epoch in range(12)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(3, "dense") == derive_seed(3, "dense")
    assert derive_seed(3, "x", 1, 11) != derive_seed(3, "x", 11, 1) != derive_seed(3, "x", "11", 1)
