"""`dlrm preprocess` as a whole, against a plain twin and torchrec's own functions; bad input."""

import contextlib
import gzip
import io
import json
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchrec.datasets.criteo import BinaryCriteoUtils

from dlrm.dataset.binary_days import open_splits
from dlrm.dataset.verify import verify
from dlrm.errors import ConfigError, DatasetError
from dlrm.materialize.command import MaterializeConfig, materialize
from dlrm.preprocess import command as command_module
from dlrm.preprocess import config as config_module
from dlrm.preprocess import workspace as workspace_module
from dlrm.preprocess.command import preprocess
from dlrm.preprocess.config import PreprocessConfig
from dlrm.preprocess.kernels import mix
from dlrm.preprocess.ranks import Ranks
from dlrm.preprocess.raw import read_blocks
from dlrm.preprocess.stages import checking, parsing, shuffling
from dlrm.preprocess.torchrec_compat import rounded_rows
from tests.unit.preprocessed import PARTS, ROWS, assert_refused, config_of, digests, fields_of, load, write

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def encode(days: list[list[str]], threshold: int = 3, counted: int = 2) -> list[tuple[np.ndarray, ...]]:
    """What the days become, unshuffled: the definition, written plainly. The first `counted` days are counted."""
    parsed = [fields_of(day) for day in days]
    minimum = min(int(integers.min()) for integers, _, _ in parsed[:-1])
    tables = []
    for column in range(26):
        counts = Counter(int(x) for _, ids, _ in parsed[:counted] for x in ids[:, column] if x)
        kept = sorted((x for x in counts if counts[x] >= threshold), key=lambda x: (-counts[x], int(mix(np.uint32(x)))))
        tables.append({0: 0, **{x: 2 + i for i, x in enumerate(kept)}})
    return [
        (
            np.log((np.maximum(integers, minimum) - minimum + 2).astype(np.float32)),
            np.array([[tables[c].get(int(x), 1) for c, x in enumerate(row)] for row in ids], np.int32),
            labels[:, None].astype(np.int32),
        )
        for integers, ids, labels in parsed
    ]


def rows_of(*arrays: np.ndarray) -> list[bytes]:
    """Each row of a day as bytes."""
    return [b"".join(np.ascontiguousarray(array[i]).tobytes() for array in arrays) for i in range(len(arrays[0]))]


def test_against_the_plain_twin(raw, lines, monkeypatch):
    monkeypatch.setattr(parsing, "read_blocks", partial(read_blocks, block_bytes=70_000))
    folder = write(raw)
    expected = encode(lines)
    written = [load(folder, f"day_{day}") for day in range(3)]
    for ours, plain in zip(written[2], expected[2], strict=True):
        assert ours.dtype == plain.dtype
        np.testing.assert_array_equal(ours, plain)
    train = [row for day in written[:2] for row in rows_of(*day)]
    before = [row for day in expected[:2] for row in rows_of(*day)]
    assert train != before
    assert Counter(train) == Counter(before)
    assert [len(day[0]) for day in written] == list(ROWS)
    moved = set(rows_of(*written[0])) & set(rows_of(*expected[1]))
    assert 150 < len(moved) < 400  # of 700 rows, 500/1200 came from the other day


def test_missing_integers_apart(raw, lines):
    plain, apart = write(raw, output="plain"), write(raw, missing_integers="apart")
    assert json.loads((apart / "manifest.json").read_text())["integers"]["missing"] == "apart"
    assert json.loads((plain / "manifest.json").read_text())["integers"]["missing"] == "zero"
    missing = np.array([[not value for value in line.split("\t")[1:14]] for line in lines[2]])
    assert 0 < missing.sum() < missing.size
    dense, told = load(plain, "day_2")[0], load(apart, "day_2")[0]
    assert dense.min() > 0.69
    np.testing.assert_array_equal(told, np.where(missing, np.float32(0), dense))
    for day in (0, 1):
        differs = load(plain, f"day_{day}")[0] != load(apart, f"day_{day}")[0]
        np.testing.assert_array_equal(differs, load(apart, f"day_{day}")[0] == 0)
    applied = write(raw, "day_2.tsv", output="later", vocabulary=str(apart))
    np.testing.assert_array_equal(load(applied, "day_0")[0], told)


def test_manifest_and_vocabulary(raw, lines):
    folder = write(raw, frequency_threshold=4)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert verify(folder) == manifest
    assert manifest["num_train_rows"] == 1200
    parsed = [fields_of(day) for day in lines]
    assert manifest["integers"]["minimum"] == -2
    assert manifest["integers"]["clamped"] == int((parsed[2][0] < -2).sum()) > 0
    for day, rows in enumerate(ROWS):
        positives = int(load(folder, f"day_{day}")[2].sum())
        assert manifest["days"][f"day_{day}"] == {
            "rows": rows, "positives": positives, "rejected": 0, "source": f"day_{day}.tsv",
        }  # fmt: skip
    assert sum(day["positives"] for day in manifest["days"].values()) == sum(labels.sum() for _, _, labels in parsed)
    for column in range(26):
        counts = Counter(int(x) for _, ids, _ in parsed[:2] for x in ids[:, column] if x)
        kept = {x: n for x, n in counts.items() if n >= 4}
        assert manifest["columns"][f"cat_{column}"] == {
            "distinct": len(counts), "kept": len(kept), "rows": 2 + len(kept),
        }  # fmt: skip
        frame = pl.read_parquet(folder / "vocabulary" / f"cat_{column}.0000.parquet")
        assert dict(zip(frame["id"], frame["count"], strict=True)) == kept
        assert frame["index"].to_list() == list(range(2, 2 + len(kept)))
        assert frame["count"].is_sorted(descending=True)


def test_the_trainer_reads_what_is_written(raw):
    rows = open_splits(write(raw), "criteo_1t")
    assert {stage: split.num_rows for stage, split in rows.items()} == {"train": 1200, "val": 150, "test": 150}


@pytest.mark.parametrize("fields", [{"workers": 1}, {"workers": 5}, {"memory_gib": 2.5}])
def test_same_bytes_whatever_the_resources(fields, raw, monkeypatch):
    reference = digests(write(raw, seed=3))
    monkeypatch.setattr(parsing, "read_blocks", partial(read_blocks, block_bytes=90_000))
    monkeypatch.setattr(shuffling, "_BUCKET_ROWS", 100)
    assert digests(write(raw, seed=3, output="other", **fields)) == reference


def test_another_seed_is_another_order(raw):
    first, second = (load(write(raw, seed=seed, output=f"seed_{seed}"), "day_0") for seed in (0, 1))
    assert (first[0] != second[0]).any()


def test_little_memory_takes_several_passes(raw, monkeypatch):
    reference = digests(write(raw))
    resources = config_module.Resources(2, 1 << 15, 1)
    monkeypatch.setattr(config_module.Resources, "within", staticmethod(lambda *_: resources))
    assert digests(write(raw, output="other")) == reference


def test_held_out_ids_may_count(raw, lines):
    folder = write(raw, vocabulary_days="all")
    np.testing.assert_array_equal(load(folder, "day_2")[1], encode(lines, counted=3)[2][1])


def test_max_embeddings_folds_as_the_trainer_would(raw, lines):
    folder = write(raw, max_embeddings=7)
    np.testing.assert_array_equal(load(folder, "day_2")[1], encode(lines)[2][1] % 7)
    columns = json.loads((folder / "manifest.json").read_text())["columns"]
    assert all(facts["rows"] == min(7, 2 + facts["kept"]) for facts in columns.values())


def test_a_vocabulary_is_applied_to_later_days(raw, lines):
    first = write(raw)
    again = write(raw, "day_2.tsv", vocabulary=str(first), output="later")
    for ours, before in zip(load(again, "day_0"), load(first, "day_2"), strict=True):
        np.testing.assert_array_equal(ours, before)
    manifest = verify(again)
    assert manifest["num_train_rows"] == 0
    assert manifest["columns"] == verify(first)["columns"]
    shuffled = write(raw, "day_0.tsv", "day_1.tsv", "day_2.tsv", vocabulary=str(first), output="same")
    assert rows_of(*load(shuffled, "day_0")) == rows_of(*load(first, "day_0"))


def test_kaggle_holds_out_the_last_seventh(raw, lines):
    folder = write(raw, "day_0.tsv", dataset_name="criteo_kaggle")
    train, held_out = lines[0][:600], lines[0][600:]
    expected = encode([train, held_out], counted=1)
    written = load(folder, "train")
    for ours, plain in zip(written, expected[1], strict=True):
        np.testing.assert_array_equal(ours[600:], plain)
    assert Counter(rows_of(*(array[:600] for array in written))) == Counter(rows_of(*expected[0]))
    assert open_splits(folder, "criteo_kaggle")["train"].num_rows == 600


def test_subsets(raw, lines):
    folder = write(raw, days=2, rows=100)
    expected = encode([lines[0][:100], lines[1][:100]], counted=1)
    np.testing.assert_array_equal(load(folder, "day_1")[1], expected[1][1])
    assert sorted(path.name for path in folder.glob("*_labels.npy")) == ["day_0_labels.npy", "day_1_labels.npy"]
    manifest = verify(folder)
    assert [day["rows"] for day in manifest["days"].values()] == [100, 100]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_packed_text_and_line_ends(suffix, end, raw, lines):
    reference = digests(write(raw))
    for day, text in enumerate(lines):
        content = end.join(line.rstrip("\n") for line in text)  # the last line has no end
        (raw / f"day_{day}.tsv").write_bytes(content.encode())
        (raw / f"day_{day}{suffix or '.txt'}").write_bytes(PACK[suffix](content.encode()))
    folder = write(raw, *(f"day_{day}{suffix or '.txt'}" for day in range(3)), output="other")
    ours = digests(folder)
    assert {name: ours[name] for name in ours if name != "manifest.json"} == {
        name: reference[name] for name in reference if name != "manifest.json"
    }


# torchrec's own functions


def torchrec_days(raw: Path, target: Path, threshold: int, seed: int) -> Path:
    """What tsv_to_npys, sparse_to_contiguous and shuffle make of the raw days."""
    for name in ("npy", "contiguous", "shuffled"):
        (target / name).mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()):
        for day in range(3):
            paths = (str(target / "npy" / f"day_{day}_{part}.npy") for part in PARTS)
            BinaryCriteoUtils.tsv_to_npys(str(raw / f"day_{day}.tsv"), *paths)
        BinaryCriteoUtils.sparse_to_contiguous(
            [str(target / "npy" / f"day_{day}_sparse.npy") for day in range(3)],
            str(target / "contiguous"), threshold, output_file_suffix=".npy",
        )  # fmt: skip
        BinaryCriteoUtils.shuffle(
            str(target / "npy"), str(target / "contiguous"), str(target / "shuffled"), dict(enumerate(ROWS[:2])),
            days=3, random_seed=seed,
        )  # fmt: skip
    return target / "shuffled"


@pytest.mark.filterwarnings("ignore:Local function is not supported by pickle")
@pytest.mark.parametrize(("threshold", "seed"), [(3, 0), (1, 11)])
def test_compat_is_torchrec_byte_for_byte(threshold, seed, raw, tmp_path, monkeypatch):
    monkeypatch.setattr(parsing, "read_blocks", partial(read_blocks, block_bytes=70_000))
    monkeypatch.setattr(shuffling, "_BUCKET_ROWS", 100)
    reference = torchrec_days(raw, tmp_path / "torchrec", threshold, seed)
    folder = write(raw, compat="torchrec", frequency_threshold=threshold, seed=seed)
    for day in range(3):
        for part in PARTS:
            name = f"day_{day}_{part}.npy"
            assert (folder / name).read_bytes() == (reference / name).read_bytes(), name


@pytest.mark.filterwarnings("ignore:Local function is not supported by pickle")
def test_compat_of_one_file(raw, tmp_path):
    reference = torchrec_days(raw, tmp_path / "torchrec", 3, 0).parent
    with contextlib.redirect_stdout(io.StringIO()):
        BinaryCriteoUtils.sparse_to_contiguous([str(reference / "npy" / "day_0_sparse.npy")], str(tmp_path))
    folder = write(raw, "day_0.tsv", dataset_name="criteo_kaggle", compat="torchrec")
    ours = [(folder / f"train_{part}.npy").read_bytes() for part in PARTS]
    assert ours[0] == (reference / "npy" / "day_0_dense.npy").read_bytes()
    assert ours[1] == (tmp_path / "day_0_sparse_contig_freq.npy").read_bytes()
    assert ours[2] == (reference / "npy" / "day_0_labels.npy").read_bytes()


def test_compat_says_which_ids_float32_merges(raw, capsys, monkeypatch):
    monkeypatch.setattr(checking, "merged_ids", lambda kept: 5 if kept > 20 else 0)
    write(raw, compat="torchrec")
    said = capsys.readouterr().out
    assert "Warning: torchrec's shuffle holds ids as float32" in said
    assert "cat_25 5" in said
    assert "cat_0 " not in said


# Bad input


def change_row(raw: Path, change) -> None:
    lines = (raw / "day_1.tsv").read_text().splitlines(keepends=True)
    lines[406] = change(lines[406])
    (raw / "day_1.tsv").write_bytes("".join(lines).encode("latin-1"))


def with_field(column: int, value: str):
    """A change of one field of a line."""

    def change(line: str) -> str:
        fields = line.rstrip("\n").split("\t")
        fields[column] = value
        return "\t".join(fields) + "\n"

    return change


BAD = [
    (lambda line: line.replace("\t", "", 1), "39 columns, expected 40"),
    (lambda line: "0\t" + line, "41 columns, expected 40"),
    (lambda _: "\n", "1 column, expected 40"),
    (with_field(4, "x1"), r"column 5 \(int_3\): 'x1', expected an integer"),
    (with_field(4, "1.5"), r"column 5 \(int_3\): '1.5'"),
    (with_field(4, str(2**40)), r"column 5 \(int_3\)"),
    (with_field(20, "0123xyz"), r"column 21 \(cat_6\): '0123xyz', expected at most 8 hexadecimal digits"),
    (with_field(20, "123456789"), r"column 21 \(cat_6\): '123456789'"),
    (with_field(39, "\xff\xfe"), r"column 40 \(cat_25\): '.{2}xff.{2}xfe'"),
    (with_field(20, "ab\0cd"), r"column 21 \(cat_6\): 'ab.x00cd'"),
    (with_field(0, "click"), r"column 1 \(label\): 'click', expected 0 or 1"),
    (with_field(0, "7"), r"column 1 \(label\): '7'"),
    (with_field(0, ""), r"column 1 \(label\): ''"),
    (with_field(20, "f" * 50_000), r"column 21 \(cat_6\): 'f+'\.\.\."),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_a_bad_row_is_refused_with_its_line_and_column(change, words, raw, monkeypatch):
    monkeypatch.setattr(parsing, "read_blocks", partial(read_blocks, block_bytes=70_000))
    change_row(raw, change)
    assert_refused(raw, f"day_1.tsv: line 407: {words}.*--bad_rows skip")


@pytest.mark.parametrize(("change", "words"), BAD)
def test_a_bad_row_is_skipped_and_listed(change, words, raw, lines):
    change_row(raw, change)
    folder = write(raw, bad_rows="skip")
    manifest = verify(folder)
    assert [day["rejected"] for day in manifest["days"].values()] == [0, 1, 0]
    assert [day["rows"] for day in manifest["days"].values()] == [700, 499, 300]
    bad = (raw / "day_1.tsv").read_bytes().split(b"\n")[406]
    rejected = (folder / "rejected.tsv").read_bytes()
    assert rejected.startswith(b"day_1.tsv\t407\t")
    assert rejected.endswith(b"\t" + bad + b"\n")
    expected = encode([lines[0], lines[1][:406] + lines[1][407:], lines[2]])
    np.testing.assert_array_equal(load(folder, "day_2")[1], expected[2][1])


def test_bad_rows_may_be_skipped_after_all(raw):
    change_row(raw, with_field(0, "7"))
    assert_refused(raw, "line 407: .*--bad_rows skip --resume")
    assert digests(write(raw, bad_rows="skip", resume=True)) == digests(write(raw, bad_rows="skip", output="other"))


def test_a_day_of_bad_rows(raw):
    (raw / "day_1.tsv").write_text("a,b,c\n" * 9)
    assert_refused(raw, "day_1.tsv: all 9 lines are bad", bad_rows="skip")


def test_text_of_another_kind_is_refused_even_if_bad_rows_are_skipped(raw, monkeypatch):
    monkeypatch.setattr(parsing, "MAX_REJECTED_PER_BLOCK", 50)
    (raw / "day_1.tsv").write_text("a,b,c\n" * 1000)
    assert_refused(
        raw,
        "day_1.tsv: line 1: 1 column, .*; all 50 lines are bad from line 1 on. Expected raw Criteo text",
        bad_rows="skip",
    )


@pytest.mark.parametrize("bad_rows", ["refuse", "skip"])
def test_where_most_rows_are_bad_skipping_them_is_no_remedy(bad_rows, raw, lines):
    bad = ["7" + line[1:] for line in lines[1][:400]]
    (raw / "day_1.tsv").write_text("".join([*lines[1][400:], *bad]))
    with pytest.raises(DatasetError, match=r"day_1.tsv: .*400 of 500 lines are bad.*Expected raw Criteo") as caught:
        write(raw, bad_rows=bad_rows)
    assert "--bad_rows" not in str(caught.value)
    assert not (raw.parent / "days").exists()


def test_a_header_is_named(raw, lines):
    header = "\t".join(["label", *(f"column_{i}" for i in range(39))]) + "\n"
    (raw / "day_0.tsv").write_text(header + "".join(lines[0]))
    assert_refused(raw, r"line 1: column 1 \(label\): 'label', expected 0 or 1. If it is a header, leave .* skip")


def without_labels(lines: list[str]) -> str:
    return "".join(line.partition("\t")[2] for line in lines)


def test_rows_without_labels_are_indexed_for_a_model(raw, lines, capsys):
    write(raw, output="trained")
    vocabulary = str(raw.parent / "trained")
    labelled = write(raw, "day_2.tsv", output="labelled", vocabulary=vocabulary)
    (raw / "test.txt").write_text(without_labels(lines[2]))
    folder = write(raw, "test.txt", vocabulary=vocabulary)
    assert "rows have no labels" in capsys.readouterr().out
    for found, expected in zip(load(folder, "day_0")[:2], load(labelled, "day_0")[:2], strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(load(folder, "day_0")[2], np.full((300, 1), -1, np.int32))
    assert verify(folder)["days"]["day_0"] == {"rows": 300, "labels": False, "rejected": 0, "source": "test.txt"}
    assert "positives" in verify(labelled)["days"]["day_0"]
    np.save(folder / "day_0_labels.npy", np.zeros((300, 1), np.int32))
    with pytest.raises(DatasetError, match=r"day_0_labels.npy: 0 at row 0, column 0, expected -1 in rows"):
        verify(folder)


def test_rows_without_labels_are_neither_trained_on_nor_scored(raw, lines):
    write(raw, output="trained")
    (raw / "test.txt").write_text(without_labels(lines[2]))
    words = r"test.txt: 39 columns, so its rows have no labels: .*alone, with --vocabulary FOLDER"
    assert_refused(raw, words, "day_0.tsv", "day_1.tsv", "test.txt")
    assert_refused(raw, words, "test.txt", dataset_name="criteo_kaggle")
    assert_refused(raw, words, "day_0.tsv", "test.txt", vocabulary=str(raw.parent / "trained"))
    folder = write(raw, "test.txt", vocabulary=str(raw.parent / "trained"))
    with pytest.raises(DatasetError, match=r"day_0_labels.npy: its rows have no labels \(-1\), so they can't be"):
        open_splits(folder, "criteo_1t", needs_training=False)


@pytest.mark.parametrize("labelled", [True, False])
def test_lines_with_and_without_labels_are_told_apart(labelled, raw, lines):
    write(raw, output="trained")
    usual, other = [lines[2], [line.partition("\t")[2] for line in lines[2]]][:: 1 if labelled else -1]
    (raw / "day_2.tsv").write_text("".join([*usual[:200], *other[200:210], *usual[210:]]))
    words = r"line 201: 39 columns, expected 40: .* a line without its label belongs into a file of such lines"
    if not labelled:
        words = r"line 201: 40 columns, expected 39 as in the other lines: .* a line with a label belongs into"
    assert_refused(raw, f"day_2.tsv: {words}", "day_2.tsv", vocabulary=str(raw.parent / "trained"))
    folder = write(raw, "day_2.tsv", vocabulary=str(raw.parent / "trained"), bad_rows="skip", resume=True)
    assert verify(folder)["days"]["day_0"]["rejected"] == 10
    assert b"\t201\t" + words.split(" columns")[0][-2:].encode() in (folder / "rejected.tsv").read_bytes()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_file_that_is_cut_short(suffix, share, raw):
    content = PACK[suffix]((raw / "day_1.tsv").read_bytes())
    (raw / f"day_1{suffix}").write_bytes(content[: int(share * len(content))])
    words = f"day_1{suffix}: can't be read to its end"
    assert_refused(raw, words, "day_0.tsv", f"day_1{suffix}", "day_2.tsv", bad_rows="skip")


def test_files_that_cannot_be(raw):
    (raw / "empty").write_text("")
    (raw / "folder").mkdir()
    os.mkfifo(raw / "fifo")
    before = sorted(raw.parent.rglob("*"))
    for name, words in (("gone", "no such file"), ("empty", "no rows"), ("folder", "a folder"), ("fifo", "not a")):
        assert_refused(raw, f"{name}: {words}", "day_0.tsv", name)
    assert sorted(raw.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("names", "fields", "words"),
    [
        (("day_0.tsv",), {}, "1 file for criteo_1t: expected two or more.*criteo_kaggle"),
        (("day_0.tsv", "day_1.tsv"), {"dataset_name": "criteo_kaggle"}, "2 files for criteo_kaggle: expected one"),
        ((), {"days": 1}, "1 file for criteo_1t"),
        ((), {"days": 4}, "--days 4: got 3 files"),
        ((), {"rows": 0}, "--rows 0: expected 1 or more"),
        ((), {"frequency_threshold": -1}, "--frequency_threshold -1"),
        ((), {"max_embeddings": 2}, "--max_embeddings 2: expected 3"),
        ((), {"seed": -1}, "--seed -1"),
        ((), {"workers": 0}, "--workers 0"),
        ((), {"memory_gib": float("nan")}, "--memory_gib nan"),
        ((), {"memory_gib": float("inf")}, "--memory_gib inf"),
        ((), {"vocabulary": ""}, "--vocabulary ''"),
        ((), {"memory_gib": 0.1}, "--memory_gib 0.1 is too little"),
        ((), {"memory_gib": 2.0, "workers": 50}, "--memory_gib 2 is too little for 50 workers"),
        ((), {"compat": "torchrec", "max_embeddings": 9}, "--max_embeddings with --compat torchrec"),
        ((), {"compat": "torchrec", "vocabulary_days": "all"}, "--vocabulary_days with --compat torchrec"),
        ((), {"vocabulary": "elsewhere", "frequency_threshold": 5}, "--frequency_threshold with --vocabulary"),
        ((), {"vocabulary": "elsewhere", "missing_integers": "apart"}, "--missing_integers with --vocabulary"),
        ((), {"compat": "torchrec", "missing_integers": "apart"}, "--missing_integers with --compat torchrec"),
        ((), {"vocabulary": "elsewhere", "max_embeddings": 5}, "--max_embeddings with --vocabulary"),
    ],
)
def test_flags_that_make_no_sense(names, fields, words, raw):
    assert_refused(raw, words, *names, error=ConfigError, **fields)
    assert [path.name for path in raw.parent.iterdir()] == ["raw"]


def test_an_applied_vocabulary_brings_its_limits(raw):
    first = write(raw, max_embeddings=5, frequency_threshold=2)
    again = write(raw, "day_2.tsv", vocabulary=str(first), output="later")
    np.testing.assert_array_equal(load(again, "day_0")[1], load(first, "day_2")[1])
    assert json.loads((again / "manifest.json").read_text())["ids"]["frequency_threshold"] == 2


def test_compat_allows_for_an_index_that_is_rounded_up(raw, monkeypatch):
    monkeypatch.setattr(shuffling, "round_to_float32", lambda indices: (indices + 1) // 2 * 2)
    monkeypatch.setattr(checking, "rounded_rows", lambda rows: rows // 2 * 2 + 1)
    assert (rounded_rows(2**24), rounded_rows(2**24 + 4), rounded_rows(2**24 + 2)) == (2**24, 2**24 + 5, 2**24 + 1)
    folder = write(raw, compat="torchrec", frequency_threshold=1)
    assert verify(folder)["columns"]["cat_25"]["rows"] % 2 == 1


def test_a_folder_of_anothers_is_left_alone(raw):
    (raw.parent / "days.partial").mkdir()
    (raw.parent / "days.partial" / "mine").write_text("precious")
    (raw.parent / "days.partial" / "lock").write_text("of something else")
    assert_refused(raw, "days.partial: is needed for the work, and is something else", error=ConfigError)
    assert (raw.parent / "days.partial" / "mine").read_text() == "precious"


def test_a_mark_that_cannot_be_written_ends_the_run_and_drops_nothing(raw, monkeypatch):
    usual = workspace_module.write_json
    failing = ["day_0.json"]

    def write_mark(path: Path, content: object) -> None:
        if path.parent.name == "scatter" and path.name in failing:
            raise OSError(28, "No space left on device", str(path))
        usual(path, content)

    reference = digests(write(raw, output="undisturbed"))
    with monkeypatch.context() as patch:
        patch.setattr(workspace_module, "write_json", write_mark)
        with pytest.raises(DatasetError, match=r"day_0.json: can't be written \(the disk is full\). .* --resume"):
            write(raw)
    assert list((raw.parent / "days.partial" / "parsed" / "day_0").iterdir())
    assert digests(write(raw, resume=True)) == reference


def test_a_folder_without_a_vocabulary(raw):
    assert_refused(raw, "manifest.json: missing", vocabulary=str(raw))
    write(raw, compat="torchrec", output="compat")
    assert_refused(raw, "holds no vocabulary that can be applied", vocabulary=str(raw.parent / "compat"))


def test_too_little_disk(raw, monkeypatch):
    monkeypatch.setattr(command_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    assert_refused(raw, "KiB of disk needed, 10 B free")
    assert [path.name for path in raw.parent.iterdir()] == ["raw"]


def test_output_that_is_there_already(raw):
    (raw.parent / "days").mkdir()
    with pytest.raises(ConfigError, match=r"--output .*days: is there already"):
        preprocess(config_of(raw), Ranks())


@pytest.mark.parametrize(
    ("names", "fields", "message"),
    [
        ((), {"missing_integers": "apart"}, "its missing_integers is 'zero', not 'apart'"),
        ((), {"frequency_threshold": 9}, "its frequency_threshold is 3, not 9"),
        ((), {"seed": 1}, "its seed is 0, not 1"),
        (("day_1.tsv", "day_0.tsv", "day_2.tsv"), {}, "its raw files is"),
    ],
)
def test_output_of_other_flags_is_not_taken_for_finished(names, fields, message, raw):
    before = digests(write(raw))
    with pytest.raises(ConfigError, match=message):
        preprocess(config_of(raw, *names, resume=True, **fields), Ranks())
    assert digests(raw.parent / "days") == before
    preprocess(config_of(raw, resume=True), Ranks())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.integers(1, 60), min_size=2, max_size=4),
    seed=st.integers(0, 2**32),
    buckets=st.integers(1, 50),
    threshold=st.integers(1, 4),
)
def test_no_row_is_lost_or_invented(rows, seed, buckets, threshold, tmp_path_factory):
    """Each row carries its number in its integers, and every row is found again with its own ids and label."""
    folder = tmp_path_factory.mktemp("property")
    rng = np.random.default_rng(seed)
    total = sum(rows)
    labels, ids = rng.integers(0, 2, total), rng.integers(0, 5, (total, 26))
    start = 0
    for day, count in enumerate(rows):
        numbers = range(start, start + count)
        text = ["\t".join([str(labels[i]), *[str(i)] * 13, *(f"{x:x}" for x in ids[i])]) for i in numbers]
        (folder / f"{day}.tsv").write_text("\n".join(text))
        start += count
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(shuffling, "_BUCKET_ROWS", buckets)
        raw = tuple(str(folder / f"{day}.tsv") for day in range(len(rows)))
        config = PreprocessConfig(raw, str(folder / "days"), seed=seed, frequency_threshold=threshold, workers=2)
        preprocess(config, Ranks())
    days = [load(folder / "days", f"day_{day}") for day in range(len(rows))]
    assert [len(day[0]) for day in days] == rows
    dense, sparse, found = (np.concatenate(arrays) for arrays in zip(*days, strict=True))
    numbers = np.round(np.exp(dense[:, 5].astype(np.float64)) - 2).astype(int)
    assert sorted(numbers.tolist()) == list(range(total))
    assert numbers[total - rows[-1] :].tolist() == list(range(total - rows[-1], total))
    np.testing.assert_array_equal(found[:, 0], labels[numbers])
    for column in range(26):
        pairs = set(zip(ids[numbers, column].tolist(), sparse[:, column].tolist(), strict=True))
        assert len(dict(pairs)) == len(pairs)  # an id has one index
        kept = [index for _, index in pairs if index > 1]
        assert len(set(kept)) == len(kept)  # and no two ids share one, but the rare ones


def test_a_threshold_of_0_is_the_same_as_1(raw, capsys):
    reference = digests(write(raw, output="of 1", frequency_threshold=1))
    capsys.readouterr()
    assert digests(write(raw, frequency_threshold=0)) == reference
    assert "--frequency_threshold 0 is the same as 1" in capsys.readouterr().out
    preprocess(config_of(raw, frequency_threshold=0, resume=True), Ranks())
    assert "is finished already" in capsys.readouterr().out


def test_names_that_are_not_utf8(raw, lines, capsys):
    sys.stdout.reconfigure(errors="backslashreplace")
    named = raw / os.fsdecode(b"jour_\xe9.tsv")
    named.write_text("".join(lines[0]) + "bad\n")
    names = (named.name, "day_1.tsv", "day_2.tsv")
    output = os.fsdecode(b"sortie_\xe9")
    folder = write(raw, *names, output=output, bad_rows="skip")
    assert verify(folder)["days"]["day_0"]["source"] == named.name
    assert (folder / "rejected.tsv").read_bytes().startswith(b"jour_\xe9.tsv\t701\t1 column, ")
    write(raw, "day_2.tsv", output=f"later_{output}", vocabulary=str(folder))
    config = MaterializeConfig(str(folder), str(raw.parent / f"several_{output}"), multi_hot_sizes=(2,) * 26)
    assert verify(folder)["num_train_rows"] == 1200
    materialize(config)
    assert verify(Path(config.output))["multi_hot_sizes"] == [2] * 26
