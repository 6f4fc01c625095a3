"""Days scored with a model of others: a later day, one of another vocabulary, one of ids that are not indices."""

import contextlib
import io
import json
import shlex
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dlrm.checkpoint.checkpoint import Checkpoint
from dlrm.checkpoint.find import find, locate
from dlrm.checkpoint.vocabulary import trained_vocabulary
from dlrm.cli import main as dlrm
from dlrm.config.flags import parse_args
from dlrm.errors import DlrmError
from dlrm.evaluate.config import parse_evaluate
from dlrm.evaluate.run import score_checkpoint
from dlrm.ranks.runtime import start_runtime
from dlrm.system.signals import StopSignals
from dlrm.train.run import run
from tests.distributed.test_faults import write_days
from tests.launching import BIN, TINY, Fork, launch
from tests.launching import run as run_command

ROWS = 2400
FLAGS = [
    *TINY,
    "--num_embeddings",
    "4000",
    "--batch_size",
    "64",
    "--test_batch_size",
    "512",
    "--adagrad",
    "--seed",
    "1",
]


def preprocess(folder: Path, output: str, *arguments: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert dlrm(["preprocess", *arguments, "--output", str(folder / output), "--frequency_threshold", "1"]) == 0
    return said.getvalue()


def work(folder: Path) -> dict[str, str]:
    """In a worker: trains a model of each kind of days, scores others, and gives what was said."""
    warnings.filterwarnings("ignore", "fbgemm..dense_embedding_codegen_lookup_function")
    torch.set_num_threads(1)
    said = {}

    def note(name: str, action) -> None:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            try:
                action()
            except DlrmError as error:
                print(f"error: {error}")
        said[name] = output.getvalue()

    with start_runtime() as runtime:

        def train(name: str, days: str, *flags: str) -> None:
            places = ["--in_memory_binary_criteo_path", str(folder / days), "--run_dir", str(folder / name)]
            note(name, lambda: run(parse_args([*FLAGS, *places, *flags]), runtime, 0.0, StopSignals()))

        def score(name: str, checkpoint: str, days: str, *flags: str) -> None:
            argv = [
                "--checkpoint",
                str(folder / checkpoint),
                "--in_memory_binary_criteo_path",
                str(folder / days),
                *flags,
            ]
            note(name, lambda: score_checkpoint(parse_evaluate(argv), argv, runtime))

        train("model", "days")
        train("kaggle model", "kaggle", "--dataset_name", "criteo_kaggle")
        train("hashed model", "hashed", "--mmap_mode")
        score("later", "model", "later", "--json", str(folder / "later.json"))
        score("latest", "model", "latest")
        score("trained before", "model", "trained before")
        score("other", "model", "other")
        score("other, allowed", "model", "other", "--allow_other_vocabulary", "--json", str(folder / "other.json"))
        score("no manifest", "model", "bare")
        score("only the hashed day", "model", "lone")
        resume = ("--resume", str(folder / "model"), "--allow_changed_data", "--epochs", "2")
        train("on other days", "other", *resume)
        train("on other days, allowed", "other", *resume, "--allow_other_vocabulary")
        train("on later days", "later days", *resume)
        train("begun on other days", "other", "--init_from", str(folder / "model"))
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Days, later ones, others, and what was said of them, in said.json."""
    folder = tmp_path_factory.mktemp("later")
    raw = folder / "raw"
    with contextlib.redirect_stdout(io.StringIO()):
        assert (
            dlrm(["synthesize", str(raw), "--rows", str(4 * ROWS), "--days", "4", "--cardinality_scale", "1e-5"]) == 0
        )
    days = [str(raw / f"day_{day}.tsv") for day in range(4)]
    preprocess(folder, "days", *days[:2])
    preprocess(folder, "kaggle", days[0], "--dataset_name", "criteo_kaggle")
    preprocess(folder, "other", *days[1:3])
    with contextlib.redirect_stdout(io.StringIO()):
        for output, source, files in (
            ("later", "days", days[2:3]),
            ("latest", "later", days[3:]),
            ("later days", "days", days[2:]),
            ("trained before", "days", days[:1]),
        ):
            argv = ["preprocess", *files, "--vocabulary", str(folder / source), "--output", str(folder / output)]
            assert dlrm(argv) == 0
    shutil.copytree(folder / "later", folder / "bare", ignore=lambda *_: ["manifest.json", "vocabulary"])
    shutil.copytree(folder / "days", folder / "hashed", ignore=lambda *_: ["manifest.json", "vocabulary"])
    (folder / "lone").mkdir()
    draw = np.random.default_rng(0)
    np.save(folder / "hashed" / "day_1_sparse.npy", draw.integers(0, 2**32, (ROWS, 26)))
    for part in ("dense", "sparse", "labels"):
        shutil.copy(folder / "hashed" / f"day_1_{part}.npy", folder / "lone" / f"day_23_{part}.npy")
    said = launch(work, 1, folder, folder=folder)[0]
    (folder / "said.json").write_text(json.dumps(said))
    return folder


def said_of(folder: Path, name: str) -> str:
    return json.loads((folder / "said.json").read_text())[name]


def test_a_run_says_which_days_train(folder: Path) -> None:
    words = "Training: day_0 (day_0.tsv). Held out: day_1 (day_1.tsv), first half val, second half test."
    assert words in said_of(folder, "model")
    environment = json.loads((folder / "model" / "environment.json").read_text())
    assert len(environment["vocabulary_sha256"]) == 64
    assert list(environment["folded_ids"]) == ["day_0", "val", "test"]


def test_the_printed_command_scores_all_rows_of_a_later_day(folder: Path) -> None:
    """Of a model of criteo_kaggle, whatever --dataset_name the day is preprocessed with."""
    for kind in ("criteo_1t", "criteo_kaggle"):
        said = io.StringIO()
        raw, output = str(folder / "raw" / "day_2.tsv"), str(folder / f"for kaggle {kind}")
        argv = ["preprocess", raw, "--vocabulary", str(folder / "kaggle"), "--output", output, "--dataset_name", kind]
        with contextlib.redirect_stdout(said):
            assert dlrm(argv) == 0
        assert "Held out: all of day_2.tsv." in said.getvalue()
        assert f"Score {ROWS:,} held-out rows" in said.getvalue()
    command = shlex.split(said.getvalue().splitlines()[-1].replace("RUN", shlex.quote(str(folder / "kaggle model"))))
    done = run_command([str(BIN / command[0]), *command[1:]], OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "Held out: day_0 (day_2.tsv), first half val, second half test." in done.stdout
    assert "Same vocabulary, later rows" in done.stdout
    assert done.stdout.count(f"| {ROWS // 2:,} samples") == 2


def test_later_days_of_the_same_vocabulary(folder: Path) -> None:
    for name in ("later", "latest"):
        assert "Same vocabulary, later rows: the data is not what" in said_of(folder, name)
        assert said_of(folder, name).count("1,200 samples") == 2
    assert json.loads((folder / "later.json").read_text())["vocabulary_is_as_trained"] is True


def test_a_held_out_day_that_the_model_was_trained_on(folder: Path) -> None:
    said = said_of(folder, "trained before")
    assert "WARNING: same vocabulary, but the held-out rows are those of day_0.tsv, on which models of this" in said
    assert "later rows" not in said


def test_days_of_another_vocabulary_are_refused(folder: Path) -> None:
    words = f"{folder / 'other'}: its days have another vocabulary than those that {folder / 'model'}/checkpoints/step_"
    assert f"error: {words}" in said_of(folder, "other")
    assert "or give --allow_other_vocabulary" in said_of(folder, "other")
    assert "AUROC" not in said_of(folder, "other")
    assert "WARNING: the days have another vocabulary" in said_of(folder, "other, allowed")
    assert "AUROC over val set" in said_of(folder, "other, allowed")
    assert json.loads((folder / "other.json").read_text())["vocabulary_is_as_trained"] is False


def test_going_on_with_days_of_another_vocabulary_is_refused(folder: Path) -> None:
    assert f"error: {folder / 'other'}: its days have another vocabulary" in said_of(folder, "on other days")
    assert "WARNING: the days have another vocabulary" in said_of(folder, "on other days, allowed")
    assert "Same vocabulary, later rows" in said_of(folder, "on later days")
    assert f"error: {folder / 'other'}: its days have another vocabulary" in said_of(folder, "begun on other days")


def test_a_vocabulary_that_nobody_knows(folder: Path) -> None:
    words = f"Whether its vocabulary is the same can't be told: {folder / 'bare'} has no manifest.json."
    assert words in said_of(folder, "no manifest")
    assert "AUROC over val set" in said_of(folder, "no manifest")


def test_a_held_out_day_of_ids_that_are_no_indices(folder: Path) -> None:
    words = "100% in val, test of the ids lie beyond their tables, and 0% in day_0"
    assert words in said_of(folder, "hashed model")
    assert f"{words} of the training." in said_of(folder, "only the hashed day")
    assert "ids that are not indices" not in said_of(folder, "model") + said_of(folder, "later")


def test_a_checkpoint_of_an_older_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its days tell the vocabulary, as long as they are there and what they were."""
    environment = json.loads((folder / "model" / "environment.json").read_text())
    expected = environment.pop("vocabulary_sha256")
    monkeypatch.setattr(Checkpoint, "read_environment", lambda _: environment)
    checkpoint = find(locate(str(folder / "model")), print)
    assert trained_vocabulary(checkpoint) == expected
    environment["data_manifest_sha256"] = "of other days"
    assert trained_vocabulary(checkpoint) is None


def test_rows_that_are_wrong_end_training_with_what_it_has_reached_saved(tmp_path: Path) -> None:
    days = tmp_path / "days"
    write_days(days, (80, 40))
    sparse = np.load(days / "day_0_sparse.npy")
    sparse[50, 3] = -1
    np.save(days / "day_0_sparse.npy", sparse)
    places: Sequence[str] = ["--in_memory_binary_criteo_path", str(days), "--run_dir", str(tmp_path / "run")]
    fork = Fork(tmp_path / "log", *TINY, "--batch_size", "4", "--mmap_mode", *places)
    assert fork.wait() == 2, fork.stdout + fork.stderr
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith("step_")]
    assert len(saved) == 1
    step = int(saved[0].removeprefix("step_"))
    assert 8 <= step <= 12
    assert "id -1 at row 50, column 3" in fork.stderr
    assert fork.stderr.endswith(f"Training up to step {step} is saved.\n")
