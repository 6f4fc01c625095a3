import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from dlrm.config.recipes import FULL_SIZE_ROWS
from dlrm.errors import ConfigError, DatasetError
from dlrm.preprocess.kernels import unmix
from dlrm.synthesize import command as synthesize_module
from dlrm.synthesize import planted as kernels
from dlrm.synthesize.command import Planted, SynthesizeConfig, expected_auroc, measure, synthesize
from tests.conftest import file_size_limit

ROWS = 24_001
ROWS_OF_DAY = [8000, 8000, 8001]
HALVES = {"": slice(None), "val_": slice(0, 4001), "test_": slice(4001, None)}  # as dlrm.dataset.binary_days cuts
SMALL_PILOT_ROWS, SMALL_PILOT_BINS = 20_000, 1_000
FULL_PILOT_ROWS, FULL_PILOT_BINS = synthesize_module._PILOT_ROWS, synthesize_module._PILOT_BINS


@pytest.fixture(scope="module", autouse=True)
def small_pilot():
    """Calibrates on a sample that is drawn in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesize_module, "_PILOT_ROWS", SMALL_PILOT_ROWS)
        patch.setattr(synthesize_module, "_PILOT_BINS", SMALL_PILOT_BINS)
        yield


@dataclass(frozen=True)
class Written:
    """A folder, fields of each line of each day, and the truth with the logits and labels that it was measured on."""

    config: SynthesizeConfig
    days: list[np.ndarray]
    truth: dict[str, float | None]
    logits: np.ndarray
    labels: np.ndarray

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def fields(self) -> np.ndarray:
        return np.concatenate(self.days)


def write(folder: Path, **settings) -> Written:
    config = SynthesizeConfig(str(folder), **settings)
    held_out = []
    with pytest.MonkeyPatch.context() as patch:
        measure = synthesize_module.measure
        patch.setattr(synthesize_module, "measure", lambda *drawn: held_out.extend(drawn) or measure(*drawn))
        truth = synthesize(config)
    days = [(folder / f"day_{day}.tsv").read_text().splitlines() for day in range(config.days)]
    return Written(config, [np.array([line.split("\t") for line in day]) for day in days], truth, *held_out)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Written:
    return write(tmp_path_factory.mktemp("planted") / "raw", rows=ROWS, click_rate=0.2, seed=3)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def numbers_of_ids(ids: np.ndarray, column: int) -> np.ndarray:
    """Each id's rank in its column, from 1; 0 where missing."""
    return np.array([unmix(np.uint32(int(text, 16))) ^ (column << 27) if text else 0 for text in ids])


def within_5_sigma(found: np.ndarray, share: np.ndarray, rows: int) -> bool:
    return bool((np.abs(found - share) <= 5 * np.sqrt(share * (1 - share) / rows)).all())


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def test_columns_are_criteo_text(written):
    assert [day.shape for day in written.days] == [(rows, 40) for rows in ROWS_OF_DAY]
    fields = written.fields
    assert set(fields[:, 0]) == {"0", "1"}
    assert all(re.fullmatch(r"0|-?[1-9]\d*|", value) for value in np.unique(fields[:, 1:14]))
    ids = np.unique(fields[:, 14:])
    assert all(re.fullmatch(r"[0-9a-f]{8}|", value) for value in ids)
    assert "00000000" not in ids
    assert all((written.folder / f"day_{day}.tsv").read_bytes().endswith(b"\n") for day in range(3))


def test_missing_values_have_the_logs_shares(written):
    missing = (written.fields == "").mean(0)
    assert missing[0] == 0
    assert within_5_sigma(missing[1:14], kernels.INTEGER_MISSING, ROWS)
    assert within_5_sigma(missing[14:], kernels.ID_MISSING, ROWS)


def test_negative_integers_are_in_one_column(written):
    negative = np.char.startswith(written.fields, "-")
    assert np.flatnonzero(negative.any(0)).tolist() == [1 + kernels.NEGATIVE_COLUMN]
    column = 1 + kernels.NEGATIVE_COLUMN
    counts = Counter(written.fields[negative[:, column], column].tolist())
    assert set(counts) == {"-1", "-2", "-3"}
    assert counts["-1"] > counts["-2"] > counts["-3"]
    assert within_5_sigma(negative[:, column].mean(), kernels.NEGATIVE_SHARE, ROWS)


@pytest.mark.parametrize("column", [c for c in range(13) if c != kernels.NEGATIVE_COLUMN])
@pytest.mark.parametrize("below", [0.5, 0.75, 0.9])
def test_integers_have_the_logs_spread(column, below, written):
    """Quantiles of a logistic variable of the column's mean and standard deviation, which log(1 + x) keeps."""
    values = np.array([int(text) for text in written.fields[:, 1 + column] if text])
    scale = kernels.INTEGER_SPREAD[column] * math.sqrt(3) / math.pi
    level = kernels.INTEGER_MEAN[column] + scale * math.log(below / (1 - below))
    slack = 5 * math.sqrt(below * (1 - below) / len(values))
    assert (values <= math.floor(math.exp(level) - 1 + 1e-3)).mean() > below - slack
    assert (values >= math.floor(math.exp(level) - 1 - 1e-3)).mean() > 1 - below - slack


def test_table_rows():
    assert SynthesizeConfig("raw", cardinality_scale=1.0).table_rows.tolist() == list(FULL_SIZE_ROWS)
    assert SynthesizeConfig("raw", cardinality_scale=0.001).table_rows.tolist() == [
        *(227605, 100, 100, 100, 100, 3, 100, 100, 63, 130229, 3068, 405, 10),
        *(100, 100, 100, 4, 100, 14, 292776, 40791, 187189, 590, 100, 100, 36),
    ]  # fmt: skip


def test_ids_are_ranks_in_disguise(written):
    held_out = written.days[-1]
    drawn = Planted(written.config, 0.0, 1.0).draw(synthesize_module._FIRST_DAY_STREAM + 2, 0, len(held_out))
    for column, rows in enumerate(written.config.table_rows):
        ids = written.fields[:, 14 + column]
        distinct = np.unique(ids[ids != ""])
        numbers = numbers_of_ids(distinct, column)
        assert len(set(numbers)) == len(distinct) <= rows
        assert 1 <= numbers.min() <= numbers.max() <= rows
        number_of = dict(zip(distinct, numbers - 1, strict=True)) | {"": -1}
        assert [number_of[text] for text in ids[-len(held_out) :]] == drawn.ranks_FR[column].tolist()


@pytest.mark.parametrize("column", [0, 9, 19, 21])
def test_ids_follow_a_power_law(column, written):
    ids = written.fields[:, 14 + column]
    ids = ids[ids != ""]
    counts = [count for _, count in Counter(ids.tolist()).most_common(100)]
    assert counts[0] > 30 * counts[99]
    numbers = numbers_of_ids(ids, column)
    tail = 1 - kernels.ZIPF_EXPONENT
    whole = 1 - (written.config.table_rows[column] + 1.0) ** tail
    for number in (1, 2, 10):
        share = (float(number) ** tail - (number + 1.0) ** tail) / whole
        assert within_5_sigma((numbers == number).mean(), share, len(ids))


def test_small_columns_have_all_their_ids(written):
    for column in (5, 8, 12, 16, 18, 25):
        ids = set(written.fields[:, 14 + column]) - {""}
        assert len(ids) == FULL_SIZE_ROWS[column]


def test_text_of_the_largest_values():
    """Ranks of the full-size columns reach the bits that tell columns apart."""
    integers_IR = np.tile(np.array([0, -3, 2**31 - 1, -(2**31)], np.int32), (13, 1))
    ranks_FR = np.array([[0, rows // 2, rows - 1, -1] for rows in FULL_SIZE_ROWS])
    text = np.zeros(4 * kernels.MAX_ROW_BYTES, np.uint8)
    size = kernels.write_text(np.array([0, 1, 1, 0], np.uint8), integers_IR, ranks_FR, text)
    lines = text[:size].tobytes().decode().splitlines(keepends=True)
    assert [line[-1] for line in lines] == ["\n"] * 4
    fields = np.array([line[:-1].split("\t") for line in lines])
    assert fields[:, 0].tolist() == ["0", "1", "1", "0"]
    assert (fields[:, 1:14].T == ["0", "-3", "2147483647", ""]).all()
    assert "00000000" not in fields[:, 14:]
    numbers = np.array([numbers_of_ids(fields[:, 14 + column], column) for column in range(26)])
    assert (numbers == ranks_FR + 1).all()


def test_truth_is_what_scikit_learn_says(written):
    truth, clicks = written.truth, sigmoid(written.logits)
    for prefix, part in HALVES.items():
        labels = written.labels[part]
        logloss = log_loss(labels, clicks[part])
        constant = log_loss(labels, np.full(len(labels), labels.mean()))
        assert truth[f"{prefix}auroc"] == pytest.approx(roc_auc_score(labels, written.logits[part]), abs=1e-12)
        assert truth[f"{prefix}logloss"] == pytest.approx(logloss, abs=1e-9)
        assert truth[f"{prefix}ne"] == pytest.approx(logloss / constant, abs=1e-9)
    assert truth["click_rate"] == written.labels.mean()
    assert set(truth) == {
        "click_rate",
        *(f"{prefix}{name}" for prefix in HALVES for name in ("auroc", "logloss", "ne")),
    }
    assert json.loads((written.folder / "truth.json").read_text()) == truth


def test_truth_is_of_the_day_that_was_written(written):
    assert written.days[2][:, 0].astype(int).tolist() == written.labels.tolist()


def test_ties_count_one_half(written):
    rounded = written.logits.round()
    truth = measure(rounded, written.labels)
    for prefix, part in HALVES.items():
        expected = roc_auc_score(written.labels[part], rounded[part])
        assert truth[f"{prefix}auroc"] == pytest.approx(expected, abs=1e-12)


def test_labels_are_drawn_from_the_planted_probabilities(written):
    """What is left of the labels goes neither with the logits nor with any column's most frequent value."""
    clicks = sigmoid(written.logits)
    left, variance = written.labels - clicks, clicks * (1 - clicks)
    columns = written.days[-1][:, 1:].T
    most_frequent = [column == Counter(column.tolist()).most_common(1)[0][0] for column in columns]
    for weights in (np.ones(len(left)), written.logits, *most_frequent):
        assert abs((left * weights).sum()) < 5 * math.sqrt((variance * weights**2).sum())


def splitmix(number: int) -> int:
    """SplitMix64's output for a counter (Steele et al., OOPSLA 2014)."""
    z = number * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def nearly_normal(number: int) -> float:
    quarters = [number >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
    return (sum(quarters) / 65536 - 2) * 1.7320508


def planted_score(seed: int, fields: list[str]) -> float:
    """The score of a line of text: 60% ids, 15% pairs, 25% integers, by variance. A missing integer counts as 0."""
    integers = pairs = 0.0
    for column, text in enumerate(fields[1:14]):
        level = (math.log(max(int(text or "0"), 0) + 1) - kernels.INTEGER_MEAN[column]) / kernels.INTEGER_SPREAD[column]
        integers += nearly_normal(splitmix(seed + column)) * math.tanh(level)
    numbers = [int(numbers_of_ids([text], column)[0]) for column, text in enumerate(fields[14:])]
    hashes = [splitmix(seed + 1000 + column * 2**40 + number) for column, number in enumerate(numbers)]
    ids = sum(nearly_normal(number) for number in hashes)
    for left, right in zip(hashes[::2], hashes[1::2], strict=True):
        pairs += sum(nearly_normal(splitmix(left + k)) * nearly_normal(splitmix(right + k)) for k in (1, 2))
    return math.sqrt(0.60 / 26) * ids + math.sqrt(0.15 / 13 / 2) * pairs + math.sqrt(0.25 / 13 / 0.55) * integers


def assert_logits_are_in_the_text(written: Written, rows: range) -> None:
    seed = int(np.random.SeedSequence([written.config.seed, 0]).generate_state(1, np.uint64)[0])
    planted = Planted.calibrated(written.config)
    fields = written.days[-1].tolist()
    expected = [planted.bias + planted.strength * planted_score(seed, fields[row]) for row in rows]
    np.testing.assert_allclose(written.logits[list(rows)], expected, rtol=0, atol=1e-9)


def test_logits_can_be_told_from_the_text(written):
    assert_logits_are_in_the_text(written, range(0, 8001, 20))


def test_logits_can_be_told_from_the_text_at_full_size(tmp_path):
    full = write(tmp_path / "raw", rows=600, days=2, cardinality_scale=1.0, seed=2**63 - 1)
    assert_logits_are_in_the_text(full, range(300))
    assert numbers_of_ids(full.fields[:, 14], 0).max() > 2**27


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_about_standard(seed):
    scores_R = Planted(SynthesizeConfig("raw", seed=seed), 0.0, 1.0).draw(7, 0, 20_000).scores_R
    assert abs(scores_R.mean()) < 1
    assert 0.5 < scores_R.var() < 1.5


def test_rows_do_not_depend_on_where_drawing_starts():
    planted = Planted(SynthesizeConfig("raw"), 0.0, 1.0)
    whole, part = planted.draw(9, 0, 100), planted.draw(9, 60, 40)
    for name in ("integers_IR", "ranks_FR", "scores_R", "luck_R"):
        assert (getattr(whole, name)[..., 60:] == getattr(part, name)).all()


def test_expected_auroc_is_the_mean_over_pairs():
    clicks = np.sort(np.random.default_rng(0).random(50)).round(2)
    assert len(set(clicks)) < 50
    won = pairs = 0.0
    for clicked in clicks:
        for other in clicks:
            weight = clicked * (1 - other)
            pairs += weight
            won += weight * (1.0 if clicked > other else 0.5 if clicked == other else 0.0)
    assert expected_auroc(clicks) == pytest.approx(won / pairs, abs=1e-12)


@pytest.mark.parametrize("auroc", [0.75, 0.85, 0.92])
def test_auroc_is_as_asked_for(auroc, tmp_path, monkeypatch):
    monkeypatch.setattr(synthesize_module, "_PILOT_ROWS", FULL_PILOT_ROWS)
    monkeypatch.setattr(synthesize_module, "_PILOT_BINS", FULL_PILOT_BINS)
    truth = synthesize(SynthesizeConfig(str(tmp_path / "raw"), rows=200_000, click_rate=0.2, auroc=auroc))
    assert truth["auroc"] == pytest.approx(auroc, abs=0.01)


def test_nothing_to_learn_is_ties(tmp_path):
    truth = synthesize(SynthesizeConfig(str(tmp_path / "raw"), rows=2000, click_rate=0.2, auroc=0.5))
    assert [truth[f"{prefix}auroc"] for prefix in HALVES] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("click_rate", [0.03, 0.25, 0.6])
def test_click_rate(click_rate, tmp_path):
    truth = synthesize(SynthesizeConfig(str(tmp_path / "raw"), rows=8000, days=2, click_rate=click_rate))
    assert within_5_sigma(truth["click_rate"], click_rate, 1 / (1 / 4000 + 1 / SMALL_PILOT_ROWS))


def test_same_seed_same_bytes(tmp_path, monkeypatch):
    def written_by(name: str, workers: int, chunk_rows: int, seed: int) -> dict[str, bytes]:
        monkeypatch.setattr(synthesize_module, "_CHUNK_ROWS", chunk_rows)
        synthesize(SynthesizeConfig(str(tmp_path / name), rows=1001, seed=seed, workers=workers))
        return bytes_of(tmp_path / name)

    first = written_by("first", workers=1, chunk_rows=50_000, seed=5)
    assert sorted(first) == ["day_0.tsv", "day_1.tsv", "day_2.tsv", "truth.json"]
    assert written_by("threads", workers=3, chunk_rows=50_000, seed=5) == first
    assert written_by("chunks", workers=1, chunk_rows=37, seed=5) == first
    assert written_by("both", workers=3, chunk_rows=37, seed=5) == first
    other = written_by("other", workers=1, chunk_rows=50_000, seed=6)
    assert all(other[name] != first[name] for name in first)


def test_days_differ_but_share_their_ids(written):
    lines = ["\t".join(line) for line in written.fields.tolist()]
    assert len(set(lines)) == ROWS
    for column in range(14, 40):
        most_frequent = [
            Counter(day[day[:, column] != "", column].tolist()).most_common(1)[0][0] for day in written.days
        ]
        assert len(set(most_frequent)) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"days": 1}, "--days 1: expected 2 days or more"),
        ({"rows": 11, "days": 3}, "--rows 11 --days 3: .*at least 4 rows each"),
        ({"rows": 7, "days": 2}, "--rows 7 --days 2: .*at least 4 rows each"),
        ({"click_rate": 0.0}, "--click_rate 0.0: expected a share between 0 and 1"),
        ({"click_rate": 1.0}, "--click_rate 1.0: expected a share between 0 and 1"),
        ({"click_rate": math.nan}, "--click_rate nan"),
        ({"auroc": 0.49}, "--auroc 0.49: expected 0.5 to 0.99"),
        ({"auroc": 0.991}, "--auroc 0.991: expected 0.5 to 0.99"),
        ({"auroc": math.nan}, "--auroc nan"),
        ({"cardinality_scale": 0.0}, "--cardinality_scale 0.0: expected more than 0, up to 1"),
        ({"cardinality_scale": 1.01}, "--cardinality_scale 1.01: expected more than 0, up to 1"),
        ({"cardinality_scale": math.nan}, "--cardinality_scale nan"),
        ({"seed": -1}, "--seed -1: expected 0 to 2"),
        ({"seed": 2**63}, "--seed 9223372036854775808"),
        ({"workers": 0}, "--workers 0: expected 1 or more"),
    ],
)
def test_settings_out_of_range(change, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        synthesize(SynthesizeConfig(str(tmp_path / "raw"), **{"rows": 400, **change}))
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_size_that_is_accepted(tmp_path):
    undefined = []
    for seed in range(6):
        small = write(tmp_path / str(seed), rows=8, days=2, click_rate=0.5, seed=seed)
        assert [len(day) for day in small.days] == [4, 4]
        for prefix, part in {"": slice(None), "val_": slice(0, 2), "test_": slice(2, 4)}.items():
            one_class = len(set(small.days[1][part, 0])) == 1
            assert [small.truth[f"{prefix}{name}"] is None for name in ("auroc", "ne")] == [one_class] * 2
            assert 0 < small.truth[f"{prefix}logloss"] < math.inf
            undefined.append(one_class)
        assert json.loads((tmp_path / str(seed) / "truth.json").read_text()) == small.truth
    assert set(undefined) == {True, False}


def test_a_folder_that_holds_something(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ConfigError, match=f"{tmp_path}: exists and is not an empty folder"):
        synthesize(SynthesizeConfig(str(tmp_path), rows=40))
    assert bytes_of(tmp_path) == {"mine": b"precious"}


@pytest.mark.parametrize(("below", "words"), [("", "exists and is not an empty folder"), ("/raw", "can't be made")])
def test_a_file_in_the_folders_place(below, words, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match=f"{tmp_path}/file{below}: {words}"):
        synthesize(SynthesizeConfig(str(tmp_path / "file") + below, rows=40))
    assert bytes_of(tmp_path) == {"file": b"precious"}


def test_a_disk_that_is_too_small(tmp_path, monkeypatch, written):
    size = sum(len(content) for content in bytes_of(written.folder).values())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=size - 1))
    with pytest.raises(DatasetError, match=r"about \d\.\d MiB of disk needed, \d\.\d MiB free. Take fewer"):
        synthesize(SynthesizeConfig(str(tmp_path / "raw"), rows=ROWS))
    with pytest.raises(DatasetError, match=r"about 232\.8 GiB of disk needed"):
        synthesize(SynthesizeConfig(str(tmp_path / "raw"), rows=10**9))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(synthesize_module, "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        synthesize(SynthesizeConfig(str(tmp_path / "raw"), rows=40))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "raw").mkdir()
    synthesize(SynthesizeConfig(str(tmp_path / "raw"), rows=400))
    assert sorted(bytes_of(tmp_path / "raw")) == ["day_0.tsv", "day_1.tsv", "day_2.tsv", "truth.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_missing_parents_are_made(tmp_path):
    synthesize(SynthesizeConfig(str(tmp_path / "a" / "b" / "raw"), rows=40))
    assert (tmp_path / "a" / "b" / "raw" / "truth.json").exists()


def test_a_limit_of_file_sizes_is_named(tmp_path):
    reason = r"\(the file-size limit of 1,024 bytes, `ulimit -f`, is reached\)"
    with file_size_limit(1 << 10), pytest.raises(DatasetError, match=rf"raw: can't be written {reason}. .* again"):
        synthesize(SynthesizeConfig(str(tmp_path / "raw"), rows=400))
    assert list(tmp_path.iterdir()) == []
