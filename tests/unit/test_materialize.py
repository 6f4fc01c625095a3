import json
import zipfile

import numpy as np
import pytest

from dlrm.dataset.companions import draw_companions
from dlrm.dataset.multi_hot import map_multi_hot
from dlrm.dataset.verify import verify
from dlrm.errors import ConfigError, DatasetError
from dlrm.materialize import command as materialize_module
from dlrm.materialize.command import MaterializeConfig, materialize
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES
from tests.conftest import file_size_limit

SIZES = (3, 1, 2, 7) + (1,) * 20 + (5, 2)
TABLE_ROWS = (1000, 3, 50, 70_001) + (20,) * 20 + (1, 400)


@pytest.fixture
def days(tmp_path, write_days):
    """A folder of 3 days."""
    write_days(tmp_path / "days", [301, 200, 77], max_id=5_000_000)
    return tmp_path / "days"


def config_of(days, **fields) -> MaterializeConfig:
    fields = {"multi_hot_sizes": SIZES, "num_embeddings_per_feature": TABLE_ROWS, **fields}
    return MaterializeConfig(str(days), str(days.parent / "multi_hot"), **fields)


def define(ids: np.ndarray, distribution: str) -> list[np.ndarray]:
    """The definition, computed directly: whole tables, in feature order."""
    np.random.seed(0)
    expanded = []
    for feature, (rows, hotness) in enumerate(zip(TABLE_ROWS, SIZES, strict=True)):
        if distribution == "uniform":
            table = np.random.randint(0, rows, size=(rows, hotness - 1))
        else:
            with np.errstate(invalid="ignore"):
                table = np.random.pareto(a=0.25, size=(rows, hotness - 1)).astype(np.int32) % rows
        own = ids[:, feature : feature + 1] % rows
        expanded.append(np.concatenate([own, table[own[:, 0]]], axis=1))
    return expanded


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("distribution", ["uniform", "pareto"])
def test_it_is_what_the_definition_gives(distribution, days, monkeypatch):
    monkeypatch.setattr(materialize_module, "_MAX_BLOCK_ROWS", 7)
    manifest = materialize(config_of(days, multi_hot_distribution_type=distribution))
    assert manifest["days"] == {"day_0": {"rows": 301}, "day_1": {"rows": 200}, "day_2": {"rows": 77}}
    for day in range(3):
        expected = define(np.load(days / f"day_{day}_sparse.npy"), distribution)
        with np.load(days.parent / "multi_hot" / f"day_{day}_sparse_multi_hot.npz") as file:
            assert file.files == [str(feature) for feature in range(NUM_CATEGORICAL_FEATURES)]
            for feature in range(NUM_CATEGORICAL_FEATURES):
                assert file[str(feature)].dtype == np.int32
                np.testing.assert_array_equal(file[str(feature)], expected[feature])


@pytest.mark.parametrize("distribution", ["uniform", "pareto"])
def test_companions_drawn_in_pieces_are_the_same(distribution):
    whole = draw_companions(np.random.RandomState(5), distribution, 1_000_003, 1000)
    generator = np.random.RandomState(5)
    pieces = [draw_companions(generator, distribution, 1_000_003, count) for count in (1, 499, 500)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert (whole >= 0).all()
    assert (whole < 1_000_003).all()


def test_members_are_mapped_aligned(days):
    materialize(config_of(days))
    path = days.parent / "multi_hot" / "day_1_sparse_multi_hot.npz"
    with np.load(path) as file:
        for feature, ids in enumerate(map_multi_hot(path)):
            assert isinstance(ids, np.memmap)
            assert ids.flags.aligned
            assert ids.offset % 64 == 0
            np.testing.assert_array_equal(ids, file[str(feature)])
    assert zipfile.ZipFile(path).testzip() is None


def test_what_numpy_saves_is_mapped_too(tmp_path):
    arrays = {str(feature): np.full((5, 2), feature, np.int32) for feature in range(NUM_CATEGORICAL_FEATURES)}
    np.savez(tmp_path / "day.npz", **arrays)
    for feature, ids in enumerate(map_multi_hot(tmp_path / "day.npz")):
        np.testing.assert_array_equal(ids, arrays[str(feature)])
    np.savez_compressed(tmp_path / "packed.npz", **arrays)
    with pytest.raises(DatasetError, match=r"packed.npz: member 0 is compressed"):
        list(map_multi_hot(tmp_path / "packed.npz"))


def test_same_bytes_whatever_the_workers(days):
    digests = []
    for workers in (1, 4):
        manifest = materialize(config_of(days, workers=workers))
        digests.append({name: entry["sha256"] for name, entry in manifest["files"].items()})
        (days.parent / "multi_hot").rename(days.parent / f"workers_{workers}")
    assert digests[0] == digests[1]


def test_verify_finds_a_flipped_byte(days):
    materialize(config_of(days))
    folder = days.parent / "multi_hot"
    assert verify(folder)["kind"] == "multi_hot_days"
    path = folder / "day_2_sparse_multi_hot.npz"
    content = bytearray(path.read_bytes())
    content[-3000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"day_2_sparse_multi_hot.npz: sha256"):
        verify(folder)


def test_table_rows_come_from_the_manifest(days):
    manifest = {"version": 1, "columns": {f"cat_{i}": {"rows": 9} for i in range(26)}}
    (days / "manifest.json").write_text(json.dumps(manifest))
    assert materialize(config_of(days, num_embeddings_per_feature=None))["num_embeddings_per_feature"] == [9] * 26


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"multi_hot_sizes": (1,) * 25}, "--multi_hot_sizes: got 25 sizes, expected 26"),
        ({"multi_hot_sizes": (0,) * 26}, "--multi_hot_sizes: got 0 to 0"),
        ({"multi_hot_sizes": (1,) * 25 + (2**16 + 1,)}, "--multi_hot_sizes: got 65537"),
        ({"num_embeddings_per_feature": (0,) * 26}, "--num_embeddings_per_feature: got 0"),
        ({"num_embeddings_per_feature": None}, "has no manifest.json"),
        ({"seed": -1}, "--seed -1"),
        ({"memory_gib": 0.5}, "--memory_gib 0.5: expected 1"),
        ({"memory_gib": float("nan")}, "--memory_gib nan"),
        ({"workers": 0}, "--workers 0"),
    ],
)
def test_flags_out_of_range(fields, words, days):
    with pytest.raises(ConfigError, match=words):
        materialize(config_of(days, **fields))
    assert [path.name for path in days.parent.iterdir()] == ["days"]


def test_days_that_are_not_there_or_wrong(days):
    (days / "day_1_sparse.npy").rename(days / "day_3_sparse.npy")
    with pytest.raises(DatasetError, match=r"day_1_sparse.npy: missing"):
        materialize(config_of(days))
    (days / "day_3_sparse.npy").rename(days / "day_1_sparse.npy")
    np.save(days / "day_1_sparse.npy", np.zeros((200, 25), np.int32))
    with pytest.raises(DatasetError, match=r"day_1_sparse.npy: int32 \[200, 25\]"):
        materialize(config_of(days))
    np.save(days / "day_1_sparse.npy", np.zeros((200, 26), np.int32))
    with (days / "day_1_sparse.npy").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DatasetError, match=r"day_1_sparse.npy: int32 \[200, 26\] in 20,804 bytes"):
        materialize(config_of(days))
    np.save(days / "day_1_sparse.npy", np.full((200, 26), -1, np.int32))
    with pytest.raises(DatasetError, match=r"day_1_sparse.npy: id -1 at row 0, column 0"):
        materialize(config_of(days))
    assert [path.name for path in days.parent.iterdir()] == ["days"]


def test_too_little_disk(days, monkeypatch):
    monkeypatch.setattr(materialize_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(DatasetError, match="MiB of disk needed, 10 B free"):
        materialize(config_of(days))


def test_output_that_is_there_already(days):
    (days.parent / "multi_hot").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        materialize(config_of(days))


@pytest.mark.parametrize("limit", [1 << 10, 100 << 10])  # of the companions, and of a day
def test_a_limit_of_file_sizes_is_named(limit, days):
    reason = rf"\(the file-size limit of {limit:,} bytes, `ulimit -f`, is reached\)"
    with file_size_limit(limit), pytest.raises(DatasetError, match=rf"multi_hot: can't be written {reason}. .* again"):
        materialize(config_of(days))
    assert [path.name for path in days.parent.iterdir()] == ["days"]
