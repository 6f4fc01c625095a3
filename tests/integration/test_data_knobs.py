"""Runs on shuffled, undersampled and multi-hot days, seen from outside."""

from pathlib import Path

import numpy as np
import pytest

from tests.distributed.test_faults import write_days
from tests.launching import TINY, read_losses, read_metrics, read_summary, run, run_main

SIZES = (3, 1, 2) + (1,) * 22 + (5,)


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "days"
    write_days(folder, (200, 150, 60))
    return folder


def run_to(run_dir: Path, *flags: str, ranks: int = 1) -> str:
    done = run_main(*TINY, *flags, "--run_dir", str(run_dir), ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def write_clicks(folder: Path, rows: tuple[int, ...], click_rate: float) -> None:
    """Days whose clicks depend on the first integer."""
    write_days(folder, rows)
    rng = np.random.default_rng(1)
    for day in range(len(rows)):
        dense = np.load(folder / f"day_{day}_dense.npy")
        clicks = rng.random((len(dense), 1)) < 2 * click_rate * dense[:, :1]
        np.save(folder / f"day_{day}_labels.npy", clicks.astype(np.int32))


def test_undersampled_training_is_calibrated_by_the_correction_and_not_without(tmp_path: Path) -> None:
    """The same rows, dropped by the flag and dropped from the files: only the flag can tell that any are gone."""
    write_clicks(tmp_path / "whole", (30_000, 20_000), 0.05)
    (tmp_path / "thinned").mkdir()
    labels = np.load(tmp_path / "whole" / "day_0_labels.npy")[:, 0]
    kept = (labels == 1) | (np.random.default_rng(2).random(len(labels)) < 0.1)
    for path in (tmp_path / "whole").glob("*.npy"):
        array = np.load(path)
        np.save(tmp_path / "thinned" / path.name, array[kept] if path.name.startswith("day_0") else array)
    flags = ["--adagrad", "--learning_rate", "0.02", "--batch_size", "64", "--seed", "1", "--epochs", "2"]
    outputs = {}
    for name, more in (("whole", ["--undersampling_rate", "0.1"]), ("thinned", [])):
        path = ["--in_memory_binary_criteo_path", str(tmp_path / name)]
        outputs[name] = run_to(tmp_path / f"run_{name}", *path, *flags, *more)
    corrected, raw = (read_summary(tmp_path / f"run_{name}") for name in ("whole", "thinned"))
    assert 0.8 < corrected["test_calibration"] < 1.25
    assert raw["test_calibration"] > 4
    assert corrected["test_ne"] < 1.02 < raw["test_ne"]
    assert corrected["num_test_samples"] == raw["num_test_samples"] == 10_000
    assert 2 * 3_700 < corrected["num_train_samples"] < 2 * 5_300
    line = "log(0.1) = -2.3026 is added to each logit."
    assert line in outputs["whole"]
    assert line not in outputs["thinned"]


def test_two_ranks_train_as_one_does_on_shuffled_undersampled_expanded_rows(days: Path, tmp_path: Path) -> None:
    """Two ranks map one copy of the companions; counts are summed over ranks."""
    flags = ["--in_memory_binary_criteo_path", str(days), "--shuffle_training_set", "--undersampling_rate", "0.8"]
    flags += ["--multi_hot_sizes", ",".join(map(str, SIZES)), "--multi_hot_distribution_type", "uniform"]
    flags += ["--collect_multi_hot_freqs_stats", "--seed", "5", "--log_every", "1", "--epochs", "2"]
    for ranks, batch_size in ((1, "32"), (2, "16")):
        run_to(tmp_path / f"ranks_{ranks}", *flags, "--batch_size", batch_size, ranks=ranks)
    one, two = (read_losses(tmp_path / f"ranks_{ranks}") for ranks in (1, 2))
    assert two == pytest.approx(one, abs=1e-5)
    samples = read_summary(tmp_path / "ranks_1")["num_train_samples"]
    assert 2 * 200 < samples < 2 * 350
    with np.load(tmp_path / "ranks_1" / "multi_hot_freqs.npz") as first:
        with np.load(tmp_path / "ranks_2" / "multi_hot_freqs.npz") as second:
            assert set(first.files) == {f"{when}_cat_{i}" for when in ("before", "after") for i in range(26)}
            for name in first.files:
                np.testing.assert_array_equal(first[name], second[name])
        for feature, size in enumerate(SIZES):
            assert first[f"before_cat_{feature}"].sum() == samples
            assert first[f"after_cat_{feature}"].sum() == samples * size


def test_counts_leave_out_what_was_built_and_not_trained_on(tmp_path: Path) -> None:
    write_days(tmp_path / "days", (4000, 200))
    flags = ["--in_memory_binary_criteo_path", str(tmp_path / "days"), "--adagrad", "--learning_rate", "0.05"]
    flags += ["--multi_hot_sizes", ",".join(map(str, SIZES)), "--collect_multi_hot_freqs_stats", "--seed", "1"]
    run_to(tmp_path / "run", *flags, "--validation_freq_within_epoch", "5", "--validation_auroc", "0.51")
    summary = read_summary(tmp_path / "run")
    assert summary["target_reached"]
    assert summary["num_train_samples"] < 4000
    with np.load(tmp_path / "run" / "multi_hot_freqs.npz") as counts:
        assert counts["before_cat_7"].sum() == summary["num_train_samples"]


def test_materialized_days_train_like_ids_made_on_the_fly(days: Path, tmp_path: Path) -> None:
    sizes = ["--multi_hot_sizes", ",".join(map(str, SIZES))]
    tables = ["--num_embeddings_per_feature", ",".join(["64"] * 26)]
    run_materialize = ["dlrm", "materialize", str(days), "--output", str(tmp_path / "multi_hot"), *sizes, *tables]
    done = run(run_materialize)
    assert done.returncode == 0, done.stderr
    common = ["--in_memory_binary_criteo_path", str(days), "--seed", "3", "--log_every", "1", "--mmap_mode"]
    path = ["--synthetic_multi_hot_criteo_path", str(tmp_path / "multi_hot")]
    for name, flags in (("made", sizes), ("read", path), ("both", [*path, *sizes])):
        run_to(tmp_path / name, *common, *flags)
    made, read, both = (
        [(line.get("loss"), line.get("logloss")) for line in read_metrics(tmp_path / name)]
        for name in ("made", "read", "both")
    )
    assert made == read == both
    done = run_main(*TINY, *common, *path, "--multi_hot_sizes", ",".join(["2"] * 26), "--run_dir", str(tmp_path / "no"))
    assert done.returncode == 2
    assert "ids per feature, expected 2,2,2" in done.stderr
    assert not (tmp_path / "no").exists()


def test_companions_beyond_the_hosts_memory_are_one_line(tmp_path: Path) -> None:
    flags = ["--multi_hot_distribution_type", "pareto", "--multi_hot_sizes", ",".join(["1000000"] * 26)]
    done = run_main(*TINY, *flags, "--num_embeddings", "100000", "--run_dir", str(tmp_path / "run"), ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("dlrm: error") == 1
    assert "--multi_hot_sizes: 9,685.7 GiB of companions a host" in done.stderr
    assert "--synthetic_multi_hot_criteo_path" in done.stderr
    assert not (tmp_path / "run").exists()
