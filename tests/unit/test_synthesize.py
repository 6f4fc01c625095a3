import json
import re

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from dlrm.errors import ConfigError
from dlrm.preprocess import synthesize as synthesize_module
from dlrm.preprocess.synthesize import SynthesizeConfig, synthesize

ROWS = 9_001


def read_lines(folder) -> list[list[list[str]]]:
    """Fields of each line of each day."""
    days = [folder / f"day_{day}.tsv" for day in range(len(list(folder.glob("day_*"))))]
    return [[line.split("\t") for line in day.read_text().splitlines()] for day in days]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of 3 days, its truth, and the logits and labels of the held-out day."""
    folder = tmp_path_factory.mktemp("raw")
    held_out = []
    with pytest.MonkeyPatch.context() as patch:
        measure = synthesize_module._measure
        patch.setattr(synthesize_module, "_measure", lambda *drawn: (held_out.extend(drawn), measure(*drawn))[1])
        truth = synthesize(SynthesizeConfig(str(folder), rows=ROWS, seed=3))
    return folder, truth, *held_out


def test_columns_are_criteo_text(written):
    days = read_lines(written[0])
    assert [len(day) for day in days] == [3000, 3000, 3001]
    fields = np.array([line for day in days for line in day])
    assert fields.shape == (ROWS, 40)
    assert set(fields[:, 0]) == {"0", "1"}
    assert all(re.fullmatch(r"-?\d+|", value) for value in np.unique(fields[:, 1:14]))
    assert all(re.fullmatch(r"[0-9a-f]{8}", value) for value in np.unique(fields[:, 14:]))
    missing_I = (fields[:, 1:14] == "").mean(0)
    assert np.abs(missing_I - 0.1).max() < 5 * np.sqrt(0.1 * 0.9 / ROWS)
    distinct_F = [len(np.unique(column)) for column in fields[:, 14:].T]
    assert distinct_F[0] == 10
    assert all(distinct <= size for distinct, size in zip(distinct_F, synthesize_module._CARDINALITIES, strict=True))
    assert max(distinct_F) > 1000


def test_the_last_line_ends(written):
    assert (written[0] / "day_2.tsv").read_bytes().endswith(b"\n")


def test_truth_is_what_scikit_learn_says(written):
    folder, truth, logits, labels = written
    middle = 1501  # of 3,001 rows, the first half larger, as in dlrm.data.binary_days
    for stage, half in (("val", slice(0, middle)), ("test", slice(middle, None))):
        assert truth[f"{stage}_auroc"] == pytest.approx(roc_auc_score(labels[half], logits[half]), abs=1e-12)
        clicks = 1 / (1 + np.exp(-logits[half]))
        assert truth[f"{stage}_logloss"] == pytest.approx(log_loss(labels[half], clicks), abs=1e-9)
        assert 0.8 < truth[f"{stage}_auroc"] < 0.92
    assert truth["click_rate"] == labels.mean()
    assert json.loads((folder / "truth.json").read_text()) == truth


def test_truth_is_of_the_day_that_was_written(written):
    folder, _, logits, labels = written
    fields = read_lines(folder)[2]
    assert [int(line[0]) for line in fields] == labels.tolist()
    clicks = 1 / (1 + np.exp(-logits))
    assert abs((labels - clicks).sum()) < 4 * np.sqrt((clicks * (1 - clicks)).sum())


def test_planted_effects_are_in_the_ids(written):
    """Rows that share the rarest effects differ in logit by what was planted: regress the logits on the ids."""
    folder, _, logits, _ = written
    planted = synthesize_module._Planted(SynthesizeConfig(str(folder), rows=ROWS, seed=3))
    total = np.full(len(logits), planted.bias)
    fields = np.array(read_lines(folder)[2])
    for names, effects, column in zip(planted.names, planted.effects, fields[:, 14:].T, strict=True):
        effect_of = dict(zip(names.to_list(), effects, strict=True))
        total += [effect_of[value] for value in column]
    # What is left is the integers' part, at most the sum of their slopes in size.
    left = logits - total
    assert np.abs(left).max() <= np.abs(planted.slopes).sum()
    assert np.var(left) < 0.35 * np.var(logits)
    negative = (fields[:, 1:14] == "-1") | (fields[:, 1:14] == "0")
    sides = np.array([left[negative[:, i]].mean() - left[~negative[:, i]].mean() for i in range(13)])
    strong = np.abs(planted.slopes) > 0.2
    assert strong.sum() >= 3
    assert (np.sign(sides[strong]) == -np.sign(planted.slopes[strong])).all()


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        synthesize(SynthesizeConfig(str(tmp_path / name), rows=600, seed=seed))
    for file in ("day_0.tsv", "day_1.tsv", "day_2.tsv", "truth.json"):
        first, second, other = ((tmp_path / name / file).read_bytes() for name in ("first", "second", "other"))
        assert first == second != other


def test_days_differ_but_share_their_ids(written):
    first, second, _ = (np.array(day) for day in read_lines(written[0]))
    assert (first != second).any(axis=1).all()
    assert set(first[:, 14]) == set(second[:, 14])


def test_chunks_do_not_change_the_rows_count(tmp_path, monkeypatch):
    monkeypatch.setattr(synthesize_module, "_CHUNK_ROWS", 64)
    synthesize(SynthesizeConfig(str(tmp_path / "raw"), rows=401, days=2))
    assert [len(day) for day in read_lines(tmp_path / "raw")] == [200, 201]


@pytest.mark.parametrize("click_rate", [0.03, 0.25, 0.6])
def test_click_rate(click_rate, tmp_path):
    truth = synthesize(SynthesizeConfig(str(tmp_path / "raw"), rows=8000, days=2, click_rate=click_rate))
    odds = truth["click_rate"] / (1 - truth["click_rate"]) * (1 - click_rate) / click_rate
    assert 1 / 2 < odds < 2


def test_more_strength_is_easier_to_predict(tmp_path):
    aurocs = [
        synthesize(SynthesizeConfig(str(tmp_path / str(strength)), rows=8000, strength=strength))["test_auroc"]
        for strength in (0.1, 0.35, 1.0)
    ]
    assert aurocs == sorted(aurocs)
    assert aurocs[0] < 0.75
    assert aurocs[2] > 0.93


def test_scores_without_strength_are_ties(tmp_path):
    truth = synthesize(SynthesizeConfig(str(tmp_path / "raw"), rows=2000, strength=0.0))
    assert (truth["val_auroc"], truth["test_auroc"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"days": 1}, "--days 1: expected 2 days or more"),
        ({"rows": 11, "days": 3}, "--rows 11 --days 3: .*at least 4 rows each"),
        ({"click_rate": 0.0}, "--click_rate 0.0"),
        ({"click_rate": 1.0}, "--click_rate 1.0"),
        ({"click_rate": float("nan")}, "--click_rate nan"),
        ({"strength": -0.1}, "--strength -0.1"),
        ({"strength": float("nan")}, "--strength nan"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_sizes_and_shares_out_of_range(change, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        synthesize(SynthesizeConfig(str(tmp_path / "raw"), **{"rows": 400, **change}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(4))
def test_the_smallest_size_that_is_accepted(seed, tmp_path):
    """2 held-out rows a half are often of one label, which has no AUROC: refused in words, or written."""
    try:
        synthesize(SynthesizeConfig(str(tmp_path / "raw"), rows=8, days=2, seed=seed))
    except ConfigError as error:
        assert "--rows 8" in str(error)  # noqa: PT017 - either outcome will do
    else:
        assert (tmp_path / "raw" / "truth.json").exists()


def test_a_folder_that_holds_something(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ConfigError, match=f"{tmp_path}: is there and not an empty folder"):
        synthesize(SynthesizeConfig(str(tmp_path), rows=40))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("below", ["", "/raw"])
def test_a_file_in_the_folders_place(below, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match=str(tmp_path / "file")):
        synthesize(SynthesizeConfig(str(tmp_path / "file") + below, rows=40))


def test_an_empty_folder_is_used(tmp_path):
    synthesize(SynthesizeConfig(str(tmp_path), rows=400))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["day_0.tsv", "day_1.tsv", "day_2.tsv", "truth.json"]
