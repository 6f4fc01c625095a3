"""The order of raw files, and files that are there twice."""

import gzip
import os
import random

import pytest

from dlrm.dataset.name_order import order_files, source_names
from dlrm.errors import ConfigError
from dlrm.preprocess.raw_files import check_distinct, describe_parts

ORDERED = [
    [f"raw/day_{day}.tsv" for day in range(12)],
    [f"raw/day_{day}.tsv{'.gz' if day % 2 else ''}" for day in range(12)],
    [f"raw/day{day:02}.zst" for day in range(9, 12)],
    [f"raw/2024-1-{day}.tsv" for day in range(1, 32)],
    [f"raw/202401{day:02}" for day in range(1, 32)],
    ["log_2023-12-31.gz", "log_2024-01-01.gz"],
    [f"raw/dt=2024-1-{day}/part-0" for day in (8, 9, 10)],
    [f"raw/{month}/{day}.tsv" for month in (2, 10) for day in (3, 20)],
    ["30-01-2024.tsv", "31-01-2024.tsv", "1-2-2024.tsv", "01-01-2025.tsv"],
    ["31.12.2023.gz", "01.01.2024.gz"],
    ["01-31-2024.tsv", "02-01-2024.tsv", "01-13-2025.tsv"],
    ["31122023.tsv", "01012024.tsv"],
    [f"part-{part:08}.tsv" for part in (2001, 2002, 2010)],
    ["part-12019", "part-12020", "part-22019"],
    ["30-12-23.tsv", "31-12-23.tsv", "01-01-24.tsv"],
    ["31.12.23", "01.01.24"],
    ["311223", "010124"],
    ["log_24-01-30", "log_24-01-31", "log_24-02-01"],
    ["240130.tsv", "240131.tsv", "240201.tsv"],
    ["dec23.tsv", "jan24.tsv"],
    ["dec-23", "jan-24", "feb-24"],
    ["31-dec-23", "5-jan-24"],
    ["jan5", "jan6", "feb1"],
    ["11-2023.tsv", "12-2023.tsv", "01-2024.tsv", "2-2024.tsv"],
    ["jan.tsv", "feb.tsv", "mar.tsv", "december.tsv.gz"],
    ["log_31Dec2023", "log_1Jan2024", "log_2Jan2024", "log_01Feb2024"],
    ["Sept-30-2024.tsv", "Oct-1-2024.tsv", "Jan-1-2025.tsv"],
    ["clicks_dec_2023.gz", "clicks_jan_2024.gz", "clicks_apr_2024.gz"],
    ["2024-Jan-31.tsv", "2024-Feb-01.tsv"],
    ["jan/day_1.tsv", "jan/day_2.tsv", "jan/day_10.tsv", "feb/day_1.tsv"],
]


@pytest.mark.parametrize("files", ORDERED)
def test_numbers_tell_the_order_of_what_a_shell_sorted(files):
    assert order_files(files) == (files, "")
    ordered, note = order_files(sorted(files))
    assert ordered == files
    assert bool(note) == (sorted(files) != files)


def test_the_note_names_two_files():
    _, note = order_files(["raw/day_0.tsv", "raw/day_1.tsv", "raw/day_10.tsv", "raw/day_2.tsv"])
    assert note.endswith("not as text: day_2.tsv before day_10.tsv.")


def test_a_shell_that_sorts_by_letters_alone():
    ordered, note = order_files([f"day_{day}.tsv" for day in (0, 10, 1, 2)])
    assert (ordered, bool(note)) == ([f"day_{day}.tsv" for day in (0, 1, 2, 10)], True)


@pytest.mark.parametrize(
    ("files", "is_told"),
    [
        (["may.tsv", "jan.tsv", "feb.tsv"], True),
        (["mon.tsv", "tue.tsv", "wed.tsv"], False),
        (["train.tsv", "test.tsv"], False),
        (["day_2.tsv", "day_0.tsv", "day_1.tsv"], True),
        (["b/1.tsv", "b/2.tsv", "a/1.tsv", "a/2.tsv"], False),
        (["b/2.tsv", "b/1.tsv", "b/3.tsv", "a/1.tsv"], True),
        (["02-01-2024.tsv", "01-02-2024.tsv"], False),
        (["day_1.tsv", "day_01.tsv"], False),
    ],
)
def test_an_order_that_somebody_made_stays(files, is_told):
    ordered, note = order_files(files)
    assert ordered == files
    assert ("is not that of the numbers" in note) == is_told


@pytest.mark.parametrize(
    "files",
    [
        ["01-02-2024.tsv", "02-01-2024.tsv"],
        ["old/day_1.tsv", "old/day_10.tsv", "old/day_2.tsv", "new/day_1.tsv"],
    ],
)
def test_names_that_do_not_tell_are_refused(files):
    with pytest.raises(ConfigError, match=r"sorted as text, and their names don't tell the order of time. Give them"):
        order_files(files)


def test_any_numbers(tmp_path):
    draw = random.Random(0)
    for _ in range(50):
        numbers = draw.sample(range(2000), 12)
        files = sorted(str(tmp_path / f"day_{number}.tsv") for number in numbers)
        assert order_files(files)[0] == [str(tmp_path / f"day_{number}.tsv") for number in sorted(numbers)]


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ("day_0.tsv", "day_0.tsv: is given twice"),
        ("../raw/day_0.tsv", "day_0.tsv: is the same file as .*day_0.tsv"),
        ("link.tsv", "link.tsv: is the same file as .*day_0.tsv"),
        ("hard.tsv", "hard.tsv: is the same file as .*day_0.tsv"),
        ("day_0.tsv.gz", "day_0.tsv.gz: is day_0.tsv in another packing"),
    ],
)
def test_a_file_that_is_given_twice(second, words, raw):
    (raw / "link.tsv").symlink_to("day_0.tsv")
    os.link(raw / "day_0.tsv", raw / "hard.tsv")
    (raw / "day_0.tsv.gz").write_bytes(gzip.compress((raw / "day_0.tsv").read_bytes()))
    with pytest.raises(ConfigError, match=f"{words}, so its rows would be there twice. Leave one of them out"):
        check_distinct([raw / "day_0.tsv", raw / "day_1.tsv", raw / second])
    check_distinct([raw / "day_0.tsv", raw / "day_1.tsv"])


def test_names_of_sources(tmp_path):
    assert source_names([tmp_path / "a" / "0.tsv", tmp_path / "b" / "1.tsv"]) == ["0.tsv", "1.tsv"]
    days = [tmp_path / f"dt={day}" / "part-0" for day in (1, 2)]
    assert source_names(days) == ["dt=1/part-0", "dt=2/part-0"]


def test_which_files_train():
    names = [f"day_{day}" for day in range(3)]
    assert describe_parts(names, is_split=False) == "Training: day_0 to day_1 (2 files). Held out: day_2."
    assert describe_parts(names[:2], is_split=False) == "Training: day_0 (1 file). Held out: day_1."
    assert describe_parts(names[:1], is_split=False) == "Held out: all of day_0."
    assert "the first six sevenths of day_0. Held out: the last" in describe_parts(names[:1], is_split=True)
