"""`dlrm verify`, and damage that it finds."""

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from dlrm.dataset.command import main
from dlrm.dataset.verify import verify
from dlrm.errors import DatasetError
from dlrm.preprocess.raw import read_blocks
from dlrm.preprocess.stages import parsing
from tests.unit.preprocessed import assert_refused, write


def test_verify_finds_what_is_wrong(raw):
    folder = write(raw, rows=300)
    assert verify(folder)["num_train_rows"] == 600

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-9] ^= 4
        path.write_bytes(content)

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-4])

    def swap(path: Path) -> None:
        other = folder / "day_1_dense.npy"
        content = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)

    faults = [
        (flip, "day_0_dense.npy", "day_0_dense.npy: sha256|day_0_dense.npy: .* expected a finite"),
        (flip, "vocabulary/cat_3.0000.parquet", "cat_3.0000.parquet: sha256"),
        (cut, "day_2_labels.npy", "day_2_labels.npy: 1,324 bytes, expected 1,328"),
        (Path.unlink, "day_1_sparse.npy", "day_1_sparse.npy: missing, though manifest.json lists it"),
        (swap, "day_0_dense.npy", "day_[01]_dense.npy: sha256"),
    ]
    for fault, name, words in faults:
        saved = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        fault(folder / name)
        with pytest.raises(DatasetError, match=words):
            verify(folder)
        for path, content in saved.items():
            path.write_bytes(content)
    verify(folder)


def change_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].update({"/etc/hostname": {"bytes": 1, "sha256": ""}}),
        lambda m: m["files"].update({"../secret": {"bytes": 1, "sha256": ""}}),
        lambda m: m["files"]["day_0_dense.npy"].update(bytes="many"),
        lambda m: m["files"]["day_0_dense.npy"].update(bytes=float("inf")),
        lambda m: m["days"]["day_0"].update(rows=-1),
        lambda m: m["days"]["day_0"].update(rows="700"),
        lambda m: m["days"]["day_0"].update(positives=None),
        lambda m: m.update(days={}),
        lambda m: m.update(columns=[]),
        lambda m: m["columns"].pop("cat_3"),
        lambda m: m["columns"]["cat_3"].update(rows=1.5),
    ],
)
def test_verify_takes_no_manifest_that_makes_no_sense(change, raw):
    folder = write(raw)
    change_manifest(folder, change)
    with pytest.raises(DatasetError, match=r"manifest.json: not a manifest") as caught:
        verify(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["<f8", "<u4", ">i4", "S4"])
def test_verify_takes_no_array_of_another_kind(dtype, raw):
    folder = write(raw)
    np.save(folder / "day_1_sparse.npy", np.load(folder / "day_1_sparse.npy").astype(dtype))
    content = (folder / "day_1_sparse.npy").read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(folder, lambda manifest: manifest["files"].update({"day_1_sparse.npy": entry}))
    with pytest.raises(DatasetError, match=r"day_1_sparse.npy: .*, expected int32 \[500, 26\]"):
        verify(folder)


def test_verify_of_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(DatasetError, match=r"manifest.json: missing"):
        verify(tmp_path)
    with pytest.raises(DatasetError, match="no such folder"):
        verify(tmp_path / "manifest.json")


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b"PAR1"),
        lambda path: path.rename(path.with_name("cat_0.0001.parquet")),
    ],
)
def test_a_vocabulary_that_is_not_as_its_manifest_says(damage, raw):
    folder = write(raw, output="first")
    damage(folder / "vocabulary" / "cat_0.0000.parquet")
    assert_refused(raw, r"vocabulary/cat_0.000[01].parquet: not as manifest.json states", vocabulary=str(folder))


def test_a_raw_file_that_grows_while_it_is_read(raw, monkeypatch):
    def grow(path: Path, *arguments, **options):
        yield from read_blocks(path, *arguments, **options)
        with path.open("a") as file:
            file.write("\n")

    monkeypatch.setattr(parsing, "read_blocks", grow)
    assert_refused(raw, "day_0.tsv: changed while it was read")


def test_verify_knows_ranges_even_where_the_checksum_fits(raw):
    folder = write(raw)
    for name, value, words in (
        ("day_1_sparse.npy", 10**6, "1000000 at row 3, column 0, expected 0 or more, and less than"),
        ("day_1_labels.npy", 2, "2 at row 3, column 0, expected 0 or 1"),
        ("day_1_dense.npy", np.nan, "nan at row 3, column 0, expected a finite number"),
    ):
        path = folder / name
        before = path.read_bytes()
        array = np.load(path)
        array[3, 0] = value
        np.save(path, array)
        with pytest.raises(DatasetError, match=words):
            verify(folder)
        path.write_bytes(before)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "files": 3, "days": {}}'])
def test_verify_without_a_manifest_that_can_be_read(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DatasetError, match=r"manifest.json: not a manifest"):
        verify(tmp_path)


def test_verify_says_which_day_is_held_out(raw, capsys):
    folder = write(raw)
    main([str(folder)])
    said = capsys.readouterr().out
    assert re.search(r"day_1: 500 rows, [\d.]+% positive, from day_1.tsv\n", said)
    assert re.search(r"day_2: 300 rows, [\d.]+% positive, from day_2.tsv, held out\n", said)
    assert "Warning" not in said


def test_verify_tells_of_days_in_the_order_of_text(raw, capsys):
    """As a version wrote them that took files as they were given."""
    folder = write(raw)
    change_manifest(folder, lambda manifest: manifest["days"]["day_1"].update(source="day_10.tsv"))
    main([str(folder)])
    words = (
        "Warning: the raw files were not taken in the order of the numbers in their names, in which day_10.tsv is the "
    )
    assert f"{words}last one: day_2.tsv is held out." in capsys.readouterr().out


def test_verify_finds_a_held_out_day_that_is_a_copy(raw):
    folder = write(raw)

    def copy(manifest) -> None:
        for part in ("dense", "sparse", "labels"):
            (folder / f"day_2_{part}.npy").write_bytes((folder / f"day_1_{part}.npy").read_bytes())
            manifest["files"][f"day_2_{part}.npy"] = manifest["files"][f"day_1_{part}.npy"]
        manifest["days"]["day_2"] = manifest["days"]["day_1"]

    change_manifest(folder, copy)
    with pytest.raises(DatasetError, match="day_2, which is held out, has the same rows as day_1, which trains"):
        verify(folder)
