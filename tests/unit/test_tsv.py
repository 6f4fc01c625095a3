import gzip
import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard
from torchrec.datasets.criteo import BinaryCriteoUtils

from dlrm.artifacts import MANIFEST_VERSION
from dlrm.data.binary_days import open_splits
from dlrm.errors import ConfigError, DatasetError
from dlrm.preprocess import tsv
from dlrm.preprocess.tsv import PreprocessConfig, preprocess

PARTS = ("dense", "sparse", "labels")
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.fixture
def raw(tmp_path, criteo_lines) -> Path:
    """A folder with day_0.tsv and day_1.tsv of 40 and 30 rows."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for day, rows in enumerate((40, 30)):
        (folder / f"day_{day}.tsv").write_text("".join(criteo_lines(rows, seed=day)))
    return folder


def config_of(raw: Path, *names: str, **fields: str) -> PreprocessConfig:
    names = names or ("day_0.tsv", "day_1.tsv")
    return PreprocessConfig(tuple(str(raw / name) for name in names), str(raw.parent / "days"), **fields)


def packed(raw: Path, suffix: str) -> list[str]:
    """Names of the two days, packed."""
    for day in ("day_0.tsv", "day_1.tsv"):
        (raw / (day + suffix)).write_bytes(PACK[suffix]((raw / day).read_bytes()))
    return ["day_0.tsv" + suffix, "day_1.tsv" + suffix]


@pytest.mark.parametrize("suffix", PACK)
def test_parity_with_torchrec(suffix, raw, tmp_path):
    assert preprocess(config_of(raw, *packed(raw, suffix))) == 70
    for day in ("day_0", "day_1"):
        references = [tmp_path / f"reference_{part}.npy" for part in PARTS]
        BinaryCriteoUtils.tsv_to_npys(str(raw / f"{day}.tsv"), *map(str, references))
        for part, reference in zip(PARTS, references, strict=True):
            ours, theirs = np.load(tmp_path / "days" / f"{day}_{part}.npy"), np.load(reference)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def test_values_by_hand(raw, tmp_path):
    preprocess(config_of(raw))
    fields = [line.split("\t") for line in (raw / "day_0.tsv").read_text().splitlines()]
    integers = np.array([[int(value or 0) for value in line[1:14]] for line in fields])
    ids = [[int(value or "0", 16) for value in line[14:]] for line in fields]
    assert max(map(max, ids)) > 2**31
    np.testing.assert_array_equal(np.load(tmp_path / "days" / "day_0_sparse.npy"), ids)
    np.testing.assert_array_equal(np.load(tmp_path / "days" / "day_0_labels.npy")[:, 0], [int(f[0]) for f in fields])
    dense = np.load(tmp_path / "days" / "day_0_dense.npy")
    np.testing.assert_allclose(dense, np.log(integers - integers.min() + 2), rtol=1e-6)


def test_manifest(raw, tmp_path):
    preprocess(config_of(raw))
    days = tmp_path / "days"
    manifest = json.loads((days / "manifest.json").read_text())
    assert (manifest["version"], manifest["kind"]) == (MANIFEST_VERSION, "binary_days")
    assert manifest["days"] == {
        "day_0": {"rows": 40, "source": "day_0.tsv"},
        "day_1": {"rows": 30, "source": "day_1.tsv"},
    }
    assert set(manifest["files"]) == {path.name for path in days.iterdir()} - {"manifest.json"}
    assert len(manifest["files"]) == 6
    for name, entry in manifest["files"].items():
        content = (days / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_trainer_reads_what_is_written(raw, tmp_path):
    preprocess(config_of(raw))
    rows = open_splits(tmp_path / "days", "criteo_1t")
    assert {stage: split.num_rows for stage, split in rows.items()} == {"train": 40, "val": 15, "test": 15}
    assert set(rows["train"].read(0, 40).labels_B.tolist()) == {0, 1}


def test_kaggle(raw, tmp_path):
    assert preprocess(config_of(raw, "day_0.tsv", dataset_name="criteo_kaggle")) == 40
    rows = open_splits(tmp_path / "days", "criteo_kaggle")
    assert {stage: split.num_rows for stage, split in rows.items()} == {"train": 34, "val": 3, "test": 3}


def test_several_frames_and_members_are_read_to_the_end(raw, criteo_lines):
    """As pzstd, pigz and `cat a.gz b.gz` write them."""
    lines = [line.encode() for line in criteo_lines(4000)]
    halves = b"".join(lines[:2500]), b"".join(lines[2500:])
    for suffix in (".gz", ".zst"):
        (raw / f"two{suffix}").write_bytes(b"".join(map(PACK[suffix], halves)))
    sizes = [struct.pack("<III", 0x184D2A50, 4, 0)] * 2  # skippable frames, which pzstd writes between the others
    frames = [part for size, half in zip(sizes, halves, strict=True) for part in (size, zstandard.compress(half))]
    (raw / "skippable.zst").write_bytes(b"".join(frames))
    text = raw / "text"
    for name in ("two.gz", "two.zst", "skippable.zst"):
        assert tsv._unpack(raw / name, text) == 4000
        assert text.read_bytes() == b"".join(lines)


def test_a_last_line_without_its_end(raw):
    (raw / "day_1.tsv").write_text((raw / "day_1.tsv").read_text().removesuffix("\n"))
    assert preprocess(config_of(raw)) == 70


def assert_refused(raw: Path, words: str, *names: str, error: type[Exception] = DatasetError) -> None:
    """One line that names what is wrong, and no trace of the attempt."""
    before = sorted(raw.parent.rglob("*"))
    with pytest.raises(error, match=words) as caught:
        preprocess(config_of(raw, *names))
    assert "\n" not in str(caught.value)
    assert sorted(raw.parent.rglob("*")) == before


def change_row(raw: Path, change) -> None:
    lines = (raw / "day_1.tsv").read_text().splitlines(keepends=True)
    lines[6] = change(lines[6])
    (raw / "day_1.tsv").write_text("".join(lines))


def with_field(column: int, value: str):
    """A change of one field of a line."""

    def change(line: str) -> str:
        fields = line.rstrip("\n").split("\t")
        fields[column] = value
        return "\t".join(fields) + "\n"

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda line: line.replace("\t", "", 1), "day_1.tsv: 39 columns in row 7, expected 40"),
        (lambda line: "0\t" + line, "day_1.tsv: 41 columns in row 7, expected 40"),
        (lambda line: line + "\n", "day_1.tsv: 1 columns in row 8, expected 40"),
        (with_field(4, "x1"), "day_1.tsv: not Criteo text .*'x1'"),
        (with_field(4, "1.5"), "day_1.tsv: not Criteo text .*'1.5'"),
        (with_field(4, str(2**40)), "day_1.tsv: not Criteo text"),
        (with_field(20, "0123xyz"), "day_1.tsv: not Criteo text .*'0123xyz'"),
        (with_field(20, "f" * 17), "day_1.tsv: not Criteo text"),
        (with_field(0, "click"), "day_1.tsv: label 'click' in row 7, expected 0 or 1"),
        (with_field(0, "7"), "day_1.tsv: label '7' in row 7, expected 0 or 1"),
        (with_field(0, ""), "day_1.tsv: label '' in row 7, expected 0 or 1"),
        (with_field(20, '"0123'), "day_1.tsv: not Criteo text"),
        (with_field(20, "f" * 200_000), "day_1.tsv: not Criteo text"),
    ],
)
def test_what_is_not_criteo_text(change, words, raw):
    change_row(raw, change)
    assert_refused(raw, words)


@pytest.mark.parametrize("values", [("-1", str(2**31 - 1)), ("-2147483648", "5")])
def test_integers_too_far_apart_for_32_bits(values, raw):
    """tsv_to_npys subtracts the smallest integer in int32: what wraps around becomes NaN, which no day may hold."""
    change_row(raw, lambda line: with_field(5, values[1])(with_field(4, values[0])(line)))
    assert_refused(raw, "day_1.tsv: ")


def test_a_file_that_is_not_there(raw):
    assert_refused(raw, "day_2.tsv: no such file", "day_0.tsv", "day_2.tsv")


def test_a_folder_for_a_file(raw):
    (raw / "folder").mkdir()
    assert_refused(raw, "folder: can't be read", "day_0.tsv", "folder")


def test_a_file_without_rows(raw):
    (raw / "day_1.tsv").write_text("")
    assert_refused(raw, "day_1.tsv: no rows")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_plain_text_by_a_packed_name(suffix, raw):
    (raw / f"day_1{suffix}").write_bytes((raw / "day_1.tsv").read_bytes())
    assert_refused(raw, f"day_1{suffix}: can't be read to its end", "day_0.tsv", f"day_1{suffix}")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_file_that_is_cut_short(suffix, share, raw):
    name = packed(raw, suffix)[1]
    content = (raw / name).read_bytes()
    (raw / name).write_bytes(content[: int(share * len(content))])
    assert_refused(raw, f"{name}: can't be read to its end", "day_0.tsv", name)


def test_a_zst_file_that_is_cut_at_the_end_of_a_row(raw):
    """Blocks are 128 KiB of text, here 1,024 lines each: what comes before the cut looks whole."""
    line = "\t".join(["1"] * 14 + ["abc"] * 22 + ["ab"] * 4) + "\n"
    assert len(line) == 128
    content = zstandard.compress(line.encode() * 4096)
    (raw / "cut.zst").write_bytes(content[:-1])
    assert_refused(raw, "cut.zst: can't be read to its end", "day_0.tsv", "cut.zst")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_file_that_is_damaged(suffix, raw):
    """Wherever a byte is wrong, there is one line and not a traceback (or the byte did not matter)."""
    name = packed(raw, suffix)[1]
    content = (raw / name).read_bytes()
    plain = (raw / "day_1.tsv").read_bytes()
    refused = 0
    for position in range(0, len(content), 23):
        damaged = raw / f"damaged{suffix}"
        damaged.write_bytes(content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :])
        try:
            tsv._unpack(damaged, raw / "text")
        except DatasetError as error:
            assert str(damaged) in str(error)  # noqa: PT017 - a byte of the header may not matter
            refused += 1
        else:
            assert (raw / "text").read_bytes() == plain or suffix == ".zst"  # zst has no checksum by default
    assert refused > len(content) / 23 / 4


def test_output_that_is_there_already(raw):
    (raw.parent / "days").mkdir()
    assert_refused(raw, "--output .*days: is there already", error=ConfigError)


def test_output_below_a_file(raw):
    (raw.parent / "days").write_text("a file")
    config = PreprocessConfig(config_of(raw).raw, str(raw.parent / "days" / "below"))
    with pytest.raises((ConfigError, DatasetError), match="days"):
        preprocess(config)


@pytest.mark.parametrize(
    ("names", "dataset_name", "words"),
    [
        (("day_0.tsv",), "criteo_1t", "one file for criteo_1t: expected two or more.*criteo_kaggle"),
        (("day_0.tsv", "day_1.tsv"), "criteo_kaggle", "2 files for criteo_kaggle: expected one"),
    ],
)
def test_the_number_of_files(names, dataset_name, words, raw):
    with pytest.raises(ConfigError, match=words):
        preprocess(config_of(raw, *names, dataset_name=dataset_name))
    assert not (raw.parent / "days").exists()


def test_more_rows_than_memory_holds(raw, monkeypatch):
    free = [40 * tsv.BYTES_PER_ROW - 1, 40 * tsv.BYTES_PER_ROW, 40 * tsv.BYTES_PER_ROW]
    monkeypatch.setattr(tsv, "available_memory_bytes", lambda: free.pop(0))
    assert_refused(raw, "day_0.tsv: 40 rows need about .* GiB of RAM")
    assert preprocess(config_of(raw)) == 70
