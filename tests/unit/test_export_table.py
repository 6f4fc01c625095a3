import errno
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dlrm.checkpoint import saved_tables as tables
from dlrm.checkpoint.find import find, locate
from dlrm.checkpoint.saved_tables import tables_of
from dlrm.cli import main
from dlrm.errors import CheckpointError
from dlrm.export_table import command as export_table
from dlrm.system.files import write_atomically
from tests.unit.checkpoint_folders import DIM, ROWS, SHARDINGS, weights, write_checkpoint

USER_ERROR = 2


def export(*arguments: object) -> int:
    return main(["export-table", *map(str, arguments)])


def refusal(capsys, *arguments: object) -> str:
    assert export(*arguments) == USER_ERROR
    captured = capsys.readouterr()
    assert captured.err.startswith("dlrm export-table: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture(params=[1, 5, ROWS, 1 << 20])
def rows_at_once(request, monkeypatch) -> int:
    monkeypatch.setattr(tables, "_BLOCK_BYTES", request.param * 4 * DIM)
    return request.param


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_npy(sharding, rows_at_once, tmp_path):
    path = write_checkpoint(tmp_path, blocks=SHARDINGS[sharding])
    assert export(path, "t_cat_10", tmp_path / "out.npy") == 0
    array = np.load(tmp_path / "out.npy", mmap_mode="r")
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, weights(10))


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_parquet(sharding, rows_at_once, tmp_path):
    path = write_checkpoint(tmp_path, blocks=SHARDINGS[sharding])
    assert export(path, "t_cat_2", tmp_path / "out.parquet") == 0
    frame = pl.read_parquet(tmp_path / "out.parquet")
    assert frame.schema == {"id": pl.Int64, "embedding": pl.Array(pl.Float32, DIM)}
    assert frame["id"].to_list() == list(range(ROWS))
    np.testing.assert_array_equal(frame["embedding"].to_numpy(), weights(2))


def test_the_newest_of_a_run_directory_with_a_name_of_any_kind(tmp_path, capsys):
    store = tmp_path / "Läufe 漢字" / "checkpoints"
    write_checkpoint(store, 10)
    write_checkpoint(store, 20)
    (write_checkpoint(store, 30) / "manifest.json").unlink()
    output = tmp_path / "tä ble.npy"
    assert export(tmp_path / "Läufe 漢字", "t_cat_2", output) == 0
    shown = capsys.readouterr().out
    assert f"Left out {store}/step_0000000030: manifest.json is missing" in shown
    assert f"{output}: 37 rows of 12 float32, 1.9 KiB, of t_cat_2 in {store}/step_0000000020" in shown
    assert export(f"file://{store}/step_0000000010", "t_cat_2", output, "--overwrite") == 0


def test_a_file_that_is_there_stays(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "store")
    output = tmp_path / "out.npy"
    output.write_text("mine")
    assert "is there already" in refusal(capsys, path, "t_cat_2", output)
    (tmp_path / "link.npy").symlink_to(tmp_path / "nothing")
    assert "is there already" in refusal(capsys, path, "t_cat_2", tmp_path / "link.npy")
    assert output.read_text() == "mine"
    assert export(path, "t_cat_2", output, "--overwrite") == 0
    assert np.load(output).shape == (ROWS, DIM)


@pytest.mark.parametrize(
    ("table", "output", "words"),
    [
        ("cat_2", "out.npy", "no table cat_2. Expected one of t_cat_2, t_cat_10."),
        ("t_cat_2", "out.csv", "out.csv: expected a name that ends in .parquet or .npy"),
        ("t_cat_2", "parquet", "parquet: expected a name that ends in .parquet or .npy"),
        ("t_cat_2", "gone/out.npy", "Expected a file's name in a folder that is there."),
        ("t_cat_2", "folder.npy", "Expected a file's name in a folder that is there."),
    ],
)
def test_mistakes(table, output, words, tmp_path, capsys):
    path = write_checkpoint(tmp_path / "store")
    (tmp_path / "folder.npy").mkdir()
    assert words in refusal(capsys, path, table, tmp_path / output)
    assert {entry.name for entry in tmp_path.iterdir()} == {"store", "folder.npy"}


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_damaged_file_is_not_exported(suffix, tmp_path, capsys):
    path = write_checkpoint(tmp_path / "store", blocks=SHARDINGS["row_wise"])
    output = tmp_path / f"out{suffix}"
    content = bytearray((path / "rank_2.bin").read_bytes())
    content[-1] ^= 1
    (path / "rank_2.bin").write_bytes(content)
    assert "rank_2.bin is damaged: its SHA-256 is not the manifest's" in refusal(capsys, path, "t_cat_2", output)
    assert export(path, "t_cat_2", output, "--no_verify") == 0
    output.unlink()
    capsys.readouterr()
    (path / "rank_2.bin").write_bytes(content[:100])
    assert "rank_2.bin has 100 bytes, expected" in refusal(capsys, path, "t_cat_2", output)
    assert "rank_2.bin ends too early" in refusal(capsys, path, "t_cat_2", output, "--no_verify")
    (path / "rank_2.bin").unlink()
    assert "rank_2.bin: No such file" in refusal(capsys, path, "t_cat_2", output)
    assert "No such file" in refusal(capsys, path, "t_cat_2", output, "--no_verify")
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


def test_only_files_that_hold_the_table_are_read(tmp_path):
    path = write_checkpoint(tmp_path / "store", blocks=[(0, 0, ROWS, 0, DIM)])
    (path / "metrics.jsonl").write_text("damaged")
    assert export(path, "t_cat_2", tmp_path / "out.npy") == 0


def test_weights_of_another_type(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "store", dtype="float64")
    assert "t_cat_2 is float64, expected float32" in refusal(capsys, path, "t_cat_2", tmp_path / "out.npy")


def test_a_disk_that_is_too_small(tmp_path, capsys, monkeypatch):
    path = write_checkpoint(tmp_path / "store")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(export_table.shutil, "disk_usage", lambda _: usage)
    assert "1.7 KiB of disk needed, 1000 B free" in refusal(capsys, path, "t_cat_2", tmp_path / "out.npy")


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_disk_that_fills_up(suffix, tmp_path, capsys, monkeypatch):
    """/dev/full takes no byte."""
    path = write_checkpoint(tmp_path / "store")

    def write_elsewhere(output, write):
        def write_in_vain(file):
            with Path("/dev/full").open("wb", buffering=0) as full:
                os.dup2(full.fileno(), file.fileno())
            write(file)

        write_atomically(output, write_in_vain)

    monkeypatch.setattr(export_table, "write_atomically", write_elsewhere)
    output = tmp_path / f"out{suffix}"
    assert f"{output}: can't be written (the disk is full), and nothing was" in refusal(capsys, path, "t_cat_2", output)
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


def test_a_folder_that_can_not_be_written(tmp_path, capsys, monkeypatch):
    path = write_checkpoint(tmp_path / "store")

    def refuse(output, write):
        raise PermissionError(errno.EACCES, "Permission denied", str(output))

    monkeypatch.setattr(export_table, "write_atomically", refuse)
    assert "can't be written (Permission denied)" in refusal(capsys, path, "t_cat_2", tmp_path / "out.npy")


def test_a_manifest_with_half_a_table(tmp_path):
    manifest = find(locate(str(write_checkpoint(tmp_path))), print).manifest
    tensors = {name: tensor for name, tensor in manifest.tensors.items() if name != "tables.t_cat_2.weight"}
    with pytest.raises(CheckpointError, match="'t_cat_2' is no table"):
        tables_of(tensors)
