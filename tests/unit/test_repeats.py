"""Rows that are in two raw files, and digests of rows."""

import gzip
import json
import re

import numpy as np
import pytest

from dlrm.errors import ConfigError, DatasetError
from dlrm.preprocess.columns import parse_block
from dlrm.preprocess.kernels import hash_rows
from dlrm.preprocess.ranks import Ranks
from dlrm.preprocess.raw import read_blocks
from dlrm.preprocess.repeats import digest_block
from tests.unit.preprocessed import assert_refused, config_of, digests, preprocess, write


def hashes_of(path) -> list[int]:
    hashes = []
    for block in read_blocks(path, block_bytes=70_000):
        columns = parse_block(block, 1)
        hashes_R = np.empty(columns.num_rows, np.uint64)
        total = hash_rows(columns.labels_R, columns.integers_IR, columns.ids_FR, columns.missing_R, hashes_R)
        assert int(total) == sum(hashes_R.tolist()) % 2**64 == digest_block(columns, 0)["hash"]
        hashes += hashes_R.tolist()
    return hashes


def test_every_field_counts(tmp_path, lines):
    """Each of the 40 columns, a missing value, and the column that a value stands in."""
    fields = lines[0][0].rstrip("\n").split("\t")
    fields = ["0", *(["7"] * 13), *(["a"] * 26)]
    changed = [["1", *fields[1:]]]
    for column in range(1, 40):
        changed += [[*fields[:column], value, *fields[column + 1 :]] for value in ("", "8" if column < 14 else "b")]
    changed += [[*fields[:5], "", "0", *fields[7:]], [*fields[:5], "0", "", *fields[7:]]]
    (tmp_path / "rows").write_text("".join("\t".join(row) + "\n" for row in (fields, *changed)))
    hashes = hashes_of(tmp_path / "rows")
    assert len(set(hashes)) == len(hashes) == 2 + 2 * 39 + 2


def test_hashes_are_spread_over_all_bits(raw):
    bits = np.unpackbits(np.array(hashes_of(raw / "day_0.tsv"), np.uint64).view(np.uint8).reshape(-1, 8), axis=1)
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda days: days[1], "has the same rows as .*day_1.tsv"),
        (lambda days: days[1][::-1], "has the same rows as .*day_1.tsv"),
        (lambda days: [line.replace("\n", "\r\n") for line in days[1]], "has the same rows as .*day_1.tsv"),
        (lambda days: days[1][:200], r"day_1.tsv: about 100% of the rows of .*day_2.tsv are in it too"),
        (lambda days: days[0] + days[1], r"day_2.tsv: about 100% of the rows of .*day_[01].tsv are in it too"),
        (
            lambda days: days[0][:100] + days[1][:100] + days[2][:20],
            "of its rows, which are held out, train too|are in it",
        ),
    ],
)
def test_rows_of_another_file_are_refused(change, words, raw, lines):
    (raw / "day_2.tsv").write_bytes("".join(change(lines)).encode())
    assert_refused(raw, f"{words}.*Remove .*days.partial.*--repeated_rows allow --resume")
    assert write(raw, repeated_rows="allow", resume=True).exists()


def test_packed_under_another_name(raw):
    (raw / "day_2.gz").write_bytes(gzip.compress((raw / "day_0.tsv").read_bytes()))
    assert_refused(raw, "day_2.gz: has the same rows as .*day_0.tsv", "day_0.tsv", "day_1.tsv", "day_2.gz")


def test_the_first_rows_of_files_alike(raw, lines):
    (raw / "day_2.tsv").write_text("".join(lines[0][:300] + lines[2]))
    assert_refused(raw, "day_2.tsv: has the same rows as .*day_0.tsv", rows=300)


def test_a_single_file_of_rows_that_come_again(raw, lines):
    (raw / "all.tsv").write_text("".join(2 * lines[0]))
    words = "all.tsv, first six sevenths: about 100% of the rows of its last seventh, which is held out, are in it too"
    assert_refused(raw, words, "all.tsv", dataset_name="criteo_kaggle")


def test_some_rows_that_come_again_are_told(raw, lines, capsys):
    (raw / "day_2.tsv").write_text("".join(lines[2] + lines[1][:90]))
    write(raw)
    assert re.search(r"Warning: about [12]\d% of the held-out rows, of \S+day_2.tsv, are", capsys.readouterr().out)


def test_rows_of_few_values_come_again_by_nature(raw, capsys):
    draw = np.random.default_rng(0)
    for day in range(3):
        rows = ["\t".join(["0", str(a), *[""] * 12, f"{b:x}", *[""] * 25]) for a, b in draw.integers(0, 9, (900, 2))]
        (raw / f"day_{day}.tsv").write_text("\n".join(rows))
    write(raw)
    assert "Warning" not in capsys.readouterr().out


def test_nothing_is_said_of_distinct_rows(raw, capsys):
    write(raw)
    said = capsys.readouterr().out
    assert "Training: day_0.tsv to day_1.tsv (2 files). Held out: day_2.tsv." in said
    assert "Warning" not in said


def test_a_file_twice_is_refused_at_once(raw):
    names = ("day_0.tsv", "day_1.tsv", "day_0.tsv")
    assert_refused(raw, "day_0.tsv: is given twice", *names, error=ConfigError)
    assert [path.name for path in raw.parent.iterdir()] == ["raw"]
    assert write(raw, *names, repeated_rows="allow").exists()


def test_days_that_a_model_was_trained_on_are_told(raw, capsys):
    first = write(raw)
    capsys.readouterr()
    later = write(raw, "day_1.tsv", vocabulary=str(first), output="later")
    assert "Warning: day_1.tsv has the rows of day_1.tsv, on which models of" in capsys.readouterr().out
    write(raw, "day_0.tsv", vocabulary=str(later), output="latest")
    assert "Warning: day_0.tsv has the rows of day_0.tsv" in capsys.readouterr().out
    write(raw, "day_2.tsv", vocabulary=str(first), output="held_out")
    assert "Warning" not in capsys.readouterr().out


def test_partial_work_of_a_version_that_did_not_hash(raw, monkeypatch):
    reference = digests(write(raw, output="undisturbed"))
    monkeypatch.setattr("dlrm.preprocess.stages.parsing.digest_block", lambda *_: {})
    with monkeypatch.context() as patch:
        patch.setattr("dlrm.preprocess.pipeline.count", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            preprocess(config_of(raw), Ranks())
    found = digests(write(raw, resume=True))
    assert {name: found[name] for name in found if name != "manifest.json"} == {
        name: reference[name] for name in reference if name != "manifest.json"
    }
    assert json.loads((raw.parent / "days" / "manifest.json").read_text())["raw_digests"] == {}


def test_files_of_the_order_of_text(raw, lines):
    """Twelve days: the last of the numbers is held out, and --days counts in their order."""
    for day in range(12):
        (raw / f"part_{day}.tsv").write_text("".join(lines[0][day * 50 : day * 50 + 50]))
    names = sorted(f"part_{day}.tsv" for day in range(12))
    manifest = json.loads((write(raw, *names) / "manifest.json").read_text())
    assert [day["source"] for day in manifest["days"].values()] == [f"part_{day}.tsv" for day in range(12)]
    manifest = json.loads((write(raw, *names, days=3, output="few") / "manifest.json").read_text())
    assert [day["source"] for day in manifest["days"].values()] == [f"part_{day}.tsv" for day in range(3)]
    with pytest.raises(DatasetError, match=r"day_0.tsv: no such file"):
        write(raw / "gone", output="none")
