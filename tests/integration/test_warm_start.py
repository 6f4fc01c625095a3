"""What a run says and refuses that begins with another's weights, or continues it on other days."""

import json
from pathlib import Path

import pytest

from tests.distributed.test_faults import write_days
from tests.launching import TINY, Fork, read_metrics, read_summary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of days, and a run of one epoch on the first."""
    folder = tmp_path_factory.mktemp("warm_start")
    write_days(folder / "days", (2048, 64))
    write_days(folder / "other", (192, 32))
    assert start(folder, "old", "--epochs", "1", "--adagrad", "--seed", "1")[0] == 0
    return folder


def start(folder: Path, run_dir: str, *flags: str, data: str = "days") -> tuple[int, str, str]:
    given = ["--in_memory_binary_criteo_path", str(folder / data), "--run_dir", str(folder / run_dir)]
    fork = Fork(folder / f"{run_dir}.log", *TINY, *given, *flags)
    return fork.wait(120), fork.stdout.replace(f"{folder}/", ""), fork.stderr.replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("flags", "data", "why"),
    [
        (["--epochs", "1"], "days", "it has trained for 1 epoch, and --epochs is 1. Give a larger one, or begin a new"),
        (["--epochs", "2"], "other", "it was trained on other data than other. --allow_changed_data continues"),
        (
            ["--epochs", "2", "--validation_auroc", "0.51"],
            "days",
            "has reached --validation_auroc 0.51. Give a higher one, or begin a new training with its weights",
        ),
    ],
)
def test_what_would_train_nothing_is_refused_before_anything_is_written(
    folder: Path, flags: list[str], data: str, why: str
) -> None:
    code, _, said = start(folder, "refused", "--adagrad", "--resume", str(folder / "old"), *flags, data=data)
    assert code == 2
    assert said.count("\n") == 1
    assert said.startswith("dlrm: error: old/checkpoints/step_0000000064: ")
    assert why in said
    assert not (folder / "refused").exists()


def test_other_days_are_trained_on_from_their_first_row(folder: Path) -> None:
    flags = ["--adagrad", "--resume", str(folder / "old"), "--allow_changed_data", "--validation_auroc", "0.999"]
    code, said, errors = start(folder, "resumed", *flags, data="other")
    assert code == 0, errors
    assert "Resuming from old/checkpoints/step_0000000064: step 64. The data was digest " in said
    assert ": epochs begin at 0, row 0 of it.\n" in said
    assert "Trained on 2,240 samples (2,048 before this run and 192 in it) in " in said
    summary = read_summary(folder / "resumed")
    assert (summary["num_train_samples"], summary["num_train_samples_before"], summary["num_train_steps"]) == (
        2240,
        2048,
        70,
    )
    assert (len(summary["val_auroc"]), summary["num_foreign_validations"]) == (2, 1)


def test_a_run_that_begins_warm_says_with_what_and_continues_with_its_own(folder: Path) -> None:
    flags = ["--init_from", str(folder / "old"), "--num_embeddings", "80", "--freeze", "t_cat_1,dense", "--seed", "3"]
    code, said, errors = start(folder, "warm", *flags, data="other")
    assert code == 0, errors
    assert "Frozen: 1 table (t_cat_1) and all dense layers. Training leaves these weights as they are.\n" in said
    assert (
        "First weights from old/checkpoints/step_0000000064 (step 64, trained on 2,048 samples, written by 1 rank):\n"
        in said
    )
    assert "  drawn: 416 new rows of 26 tables (t_cat_0, t_cat_1, t_cat_2, 23 more)\n" in said
    assert "Trained on 192 samples in " in said
    environment = json.loads((folder / "warm" / "environment.json").read_text())
    assert environment["init_checkpoint"].endswith("old/checkpoints/step_0000000064")
    assert read_metrics(folder / "warm")[0]["kind"] == "init"

    (folder / "warm" / "summary.json").unlink()  # as if it had been lost at its very end
    code, said, errors = start(folder, "warm", *flags, "--epochs", "2", data="other")
    assert code == 0, errors
    assert "Resuming from warm/checkpoints/step_0000000006: step 6" in said
    assert "First weights" not in said
    assert "Trained on 384 samples (192 since it was resumed at step 6) in " in said
    again = json.loads((folder / "warm" / "environment.json").read_text())
    assert again["init_manifest_sha256"] == environment["init_manifest_sha256"]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (
            ["--num_embeddings", "63"],
            "--init_from: old/checkpoints/step_0000000064: t_cat_0 has 64 rows there and 63 here",
        ),
        (["--init_optimizer", "--optimizer", "rowwise_adagrad"], "its optimizer's state is of adagrad, and --init_opt"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    folder: Path, flags: list[str], why: str
) -> None:
    code, _, said = start(folder, "refused", "--init_from", str(folder / "old"), *flags)
    assert (code, said.count("\n")) == (2, 1)
    assert why in said
    assert not (folder / "refused").exists()


def test_checkpoints_of_a_training_that_did_not_begin_so_are_not_continued(folder: Path) -> None:
    (folder / "old" / "summary.json").rename(folder / "summary.json")
    code, _, said = start(folder, "old", "--adagrad", "--init_from", "elsewhere")
    (folder / "summary.json").rename(folder / "old" / "summary.json")
    assert code == 2
    assert "it is of a training that did not begin with --init_from elsewhere" in said
