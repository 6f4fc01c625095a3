"""One process in hostile surroundings: a clear line, nothing lost or half-written, and the same command goes on."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.checkpoint.checkpoint import read_checkpoint
from dlrm.checkpoint.store import open_store
from dlrm.errors import RunDirectoryError
from dlrm.train.run_directory import RunDirectory
from tests.distributed.test_faults import write_days
from tests.launching import TINY, Fork, read_losses, read_metrics, read_summary, wait_until

STEPS = 100
FLAGS = [*TINY, "--batch_size", "4", "--seed", "1", "--checkpoint_every", "5", "--log_every", "1"]
ADDED = [
    *("--multi_hot_sizes", ",".join(["3"] * 26), "--collect_multi_hot_freqs_stats", "--undersampling_rate", "0.9"),
    *("--shuffle_training_set", "--shuffle_batches", "--optimizer", "adagrad"),
]
"""What keeps more than weights, and draws more than batches."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Binary days, and an undisturbed run on them that keeps all its checkpoints."""
    folder = tmp_path_factory.mktemp("survival")
    write_days(folder / "days", (STEPS * 4, 40))
    train(folder, "undisturbed", "--keep", "1000")
    return folder


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    for child in multiprocessing.active_children():
        child.kill()


def start(
    folder: Path, run: str, *flags: str, log: str | None = None, changes: Mapping[str, Any] | None = None
) -> Fork:
    places = ["--in_memory_binary_criteo_path", str(folder / "days"), "--run_dir", str(folder / run)]
    return Fork(folder / f"{log or run}.log", *FLAGS, *places, *flags, changes=changes)


def train(folder: Path, run: str, *flags: str, code: int = 0) -> Fork:
    """A run that ends with this exit code; with an error of one line, if it is the user's to mend."""
    done = start(folder, run, *flags)
    assert done.wait() == code, done.stdout + done.stderr
    if code == 2:
        assert done.stderr.startswith("dlrm: error: ")
        assert done.stderr.count("\n") == 1
    return done


def unfinished(folder: Path, run: str, newest: int = STEPS) -> Path:
    """A copy of the undisturbed run as it was with this checkpoint, the one before it, and the first."""
    path = folder / run
    shutil.copytree(folder / "undisturbed", path)
    (path / "summary.json").unlink()
    for checkpoint in path.glob("checkpoints/*"):
        if int(checkpoint.name.removeprefix("step_")) not in (newest, newest - 5, 5):
            shutil.rmtree(checkpoint)
    return path


def step(run_dir: Path, number: int) -> Path:
    return run_dir / "checkpoints" / f"step_{number:010d}"


def digest_of(run_dir: Path) -> str:
    """Of the newest checkpoint's tensors."""
    return sha256((max(run_dir.glob("checkpoints/step_*")) / "rank_0.bin").read_bytes()).hexdigest()


def assert_same(run_dir: Path, expected: Path) -> None:
    """The outcome of two runs, bit for bit."""
    assert read_losses(run_dir) == read_losses(expected)
    assert read_summary(run_dir)["test_logloss"] == read_summary(expected)["test_logloss"]
    assert digest_of(run_dir) == digest_of(expected)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_under_checkpoints(folder: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=300k")
    flags = ["--checkpoint_dir", str(disk / "checkpoints")]
    done = train(folder, "full", *flags, code=2)
    assert f"{disk / 'checkpoints'}: can't be written (the disk is full)" in done.stderr
    assert "the same command" in done.stderr
    store = open_store(str(disk / "checkpoints"))
    lock, *names = [path.name for path in sorted((disk / "checkpoints").iterdir())]
    assert lock == ".lock"
    assert names
    assert all(name.startswith("step_") for name in names)  # nothing partial
    for name in names:
        checkpoint = read_checkpoint(store, name)
        checkpoint.verify(checkpoint.manifest.files)
    small_disk("size=4m")
    done = train(folder, "full", *flags)
    assert f"Resuming from {disk / 'checkpoints'}/{names[-1]}" in done.stdout
    assert read_losses(folder / "full") == read_losses(folder / "undisturbed")
    tensors = (disk / "checkpoints" / f"step_{STEPS:010d}" / "rank_0.bin").read_bytes()
    assert sha256(tensors).hexdigest() == digest_of(folder / "undisturbed")


def test_a_full_disk_under_the_run_directory(folder: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=36k")
    (folder / "tiny").symlink_to(disk)
    flags = ["--checkpoint_dir", str(folder / "tiny-checkpoints")]
    done = train(folder, "tiny", *flags, code=2)
    assert f"{folder / 'tiny'}: can't be written (the disk is full)" in done.stderr
    assert 0 < len(read_losses(folder / "tiny")) < STEPS  # all lines are whole
    small_disk("size=4m")
    done = train(folder, "tiny", *flags)
    assert f"Resuming from {folder / 'tiny-checkpoints'}/step_" in done.stdout
    assert read_losses(folder / "tiny") == read_losses(folder / "undisturbed")


def test_a_disk_that_turns_read_only(folder: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=8m")
    flags = ["--checkpoint_dir", str(disk / "checkpoints"), "--epochs", "100"]
    running = start(folder, "readonly", *flags)
    wait_until(lambda: (disk / "checkpoints" / "step_0000000010").exists())
    wait_until(lambda: subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=False).returncode == 0)
    assert running.wait() == 2
    assert f"{disk / 'checkpoints'}: can't be written (Read-only file system)" in running.stderr
    assert running.stderr.count("\n") == 1
    newest = read_metrics(folder / "readonly")[-1]["step"]
    done = train(folder, "readonly", *flags, code=2)
    assert "can't be written (Read-only file system). Choose another --checkpoint_dir" in done.stderr
    assert read_metrics(folder / "readonly")[-1]["step"] == newest


def test_a_run_directory_that_turns_read_only(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=1m")
    directory = RunDirectory(disk)
    directory.append_metrics({"kind": "train", "step": 1})
    small_disk("ro")
    with pytest.raises(RunDirectoryError, match=rf"{disk}: can't be written \(Read-only file system\)"):
        directory.append_metrics({"kind": "train", "step": 2})
    assert read_metrics(disk) == [{"kind": "train", "step": 1}]


@pytest.mark.parametrize(
    ("number", "flags", "kind"),
    [(signal.SIGHUP, [], "file"), (signal.SIGTERM, [], "file"), (signal.SIGINT, ADDED, "local")],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    folder: Path, number: signal.Signals, flags: list[str], kind: str
) -> None:
    expected = folder / "undisturbed"
    if flags:
        expected = folder / "added"
        train(folder, "added", *flags)
    run_dir = folder / number.name
    flags = [*flags, "--checkpoint_dir", f"{kind}://{run_dir / 'checkpoints'}"]
    running = start(folder, number.name, *flags)
    wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(read_losses(run_dir)) > 20)
    running.send(number)
    assert running.wait() == 128 + number
    assert f"dlrm: {number.name}: saving a checkpoint" in running.stderr
    stopped = len(read_losses(run_dir))
    assert stopped < STEPS
    assert f"stopped after step {stopped}, which is saved" in running.stderr
    assert step(run_dir, stopped).is_dir()
    done = train(folder, number.name, *flags)
    assert f"step_{stopped:010d}: step {stopped}, epoch 0" in done.stdout
    assert_same(run_dir, expected)
    assert len(list(run_dir.glob("checkpoints/step_*"))) <= 3
    if "--collect_multi_hot_freqs_stats" in flags:
        counts, expected_counts = (np.load(path / "multi_hot_freqs.npz") for path in (run_dir, expected))
        assert counts["after_cat_0"].sum() == 3 * read_summary(run_dir)["num_train_samples"]
        assert all((counts[name] == expected_counts[name]).all() for name in expected_counts.files)


def test_damaged_checkpoints_are_named_and_the_one_before_is_taken(folder: Path) -> None:
    run_dir = unfinished(folder, "damaged", newest=60)
    flip(step(run_dir, 60) / "rank_0.bin")
    truncate(step(run_dir, 55) / "manifest.json")
    for number, file in ((60, "rank_0.bin is damaged"), (55, "manifest.json is damaged")):
        done = train(folder, "new", "--resume", str(step(run_dir, number)), code=2)
        assert f"{step(run_dir, number)}: {file}" in done.stderr
        assert not (folder / "new").exists()
    done = train(folder, "damaged", "--keep", "2")
    assert f"Left out {step(run_dir, 60)}: rank_0.bin is damaged: its SHA-256 is not the manifest's." in done.stdout
    assert f"Left out {step(run_dir, 55)}: manifest.json is damaged" in done.stdout
    assert f"Resuming from {step(run_dir, 5)}: step 5," in done.stdout
    assert_same(run_dir, folder / "undisturbed")
    left = sorted(path.name for path in run_dir.glob("checkpoints/*"))
    assert left == [step(run_dir, number).name for number in (55, 60, 95, 100)]  # what is damaged stays


def test_nothing_but_damaged_checkpoints_is_no_reason_to_begin_again(folder: Path) -> None:
    run_dir = unfinished(folder, "all-damaged")
    for checkpoint in run_dir.glob("checkpoints/*"):
        flip(checkpoint / "config.json")
    before = contents(run_dir)
    done = train(folder, "all-damaged", code=2)
    assert (
        f"{run_dir / 'checkpoints'}: no checkpoint there is sound. {step(run_dir, STEPS).name}: config.json is"
        in done.stderr
    )
    assert contents(run_dir) == before


def test_a_checkpoint_of_another_model(folder: Path) -> None:
    run_dir = unfinished(folder, "other-model")
    before = contents(run_dir)
    flags = ["--embedding_dim", "4", "--dense_arch_layer_sizes", "16,4"]
    done = train(folder, "other-model", *flags, code=2)
    assert "it was written with --embedding_dim 8 (here 4), --dense_arch_layer_sizes 16,8 (here 16,4)." in done.stderr
    assert contents(run_dir) == before


def test_data_that_has_changed(folder: Path) -> None:
    run_dir = unfinished(folder, "other-data", newest=50)
    days = folder / "days"
    path = days / "day_0_labels.npy"
    labels = np.load(path)
    before = contents(run_dir)
    np.save(path, 1 - labels)
    try:
        done = train(folder, "other-data", code=2)
        assert (
            f"it was trained on other data than {days}. --allow_changed_data continues all the same, from row 0"
            in done.stderr
        )
        assert contents(run_dir) == before
        train(folder, "other-data", "--allow_changed_data")
    finally:
        np.save(path, labels)
    losses = [read_losses(path) for path in (run_dir, folder / "undisturbed")]
    assert losses[0][:50] == losses[1][:50]
    assert losses[0][50] != losses[1][50]


def test_links_out_of_the_run_directory(folder: Path) -> None:
    """What is behind a link is not read, written or removed. The folder of all checkpoints may be one, though."""
    run_dir = unfinished(folder, "links", newest=60)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    step(run_dir, 60).rename(elsewhere / "step")
    step(run_dir, 60).symlink_to(elsewhere / "step")
    (step(run_dir, 55) / "rank_0.bin").rename(elsewhere / "rank_0.bin")
    (step(run_dir, 55) / "rank_0.bin").symlink_to(elsewhere / "rank_0.bin")
    (run_dir / "metrics.jsonl").rename(elsewhere / "metrics.jsonl")
    (run_dir / "metrics.jsonl").symlink_to(elsewhere / "metrics.jsonl")
    before = contents(elsewhere)
    (run_dir / "checkpoints").rename(folder / "big disk")
    (run_dir / "checkpoints").symlink_to(folder / "big disk")
    done = train(folder, "links")
    assert f"Left out {step(run_dir, 60)}: manifest.json: lies behind a link, which is not followed." in done.stdout
    assert f"Left out {step(run_dir, 55)}: rank_0.bin: is a link, or no file." in done.stdout
    assert_same(run_dir, folder / "undisturbed")
    assert contents(elsewhere) == before
    left = sorted(path.name for path in (folder / "big disk").glob("step_*") if not path.is_symlink())
    assert left == [step(run_dir, number).name for number in (55, 95, 100)]


def test_a_run_directory_with_spaces_and_umlauts(folder: Path) -> None:
    name = "ein schöner Lauf 漢字"
    running = start(folder, name)
    wait_until(lambda: (folder / name / "metrics.jsonl").exists() and len(read_losses(folder / name)) > 10)
    running.send(signal.SIGTERM)
    assert running.wait() == 143
    train(folder, name)
    assert_same(folder / name, folder / "undisturbed")


def test_two_runs_on_one_run_directory(folder: Path) -> None:
    first = start(folder, "shared")
    wait_until(lambda: (folder / "shared" / "metrics.jsonl").exists())
    first.send(signal.SIGSTOP)
    second = start(folder, "shared", log="second", changes={"dlrm.system.lock._SECONDS": 0.5})
    assert second.wait() == 2
    assert "another run is using it. Waiting for up to a minute." in second.stdout
    assert f"--run_dir {folder / 'shared'}: another run is using it. Choose another folder, or end" in second.stderr
    assert second.stderr.count("\n") == 1
    third = start(folder, "shared", log="third")
    wait_until(lambda: "Waiting" in third.stdout)
    first.send(signal.SIGCONT)
    assert first.wait() == 0
    assert third.wait() == 2
    assert "holds a finished run" in third.stderr
    assert_same(folder / "shared", folder / "undisturbed")


def test_two_runs_on_one_folder_of_checkpoints(folder: Path) -> None:
    place = ["--checkpoint_dir", str(folder / "shared place")]
    first = start(folder, "owner", *place)
    wait_until(lambda: (folder / "owner" / "metrics.jsonl").exists())
    first.send(signal.SIGSTOP)
    second = start(folder, "guest", *place, changes={"dlrm.system.lock._SECONDS": 0.5})
    assert second.wait() == 2
    assert f"--checkpoint_dir {folder / 'shared place'}: another run is using it. Choose another" in second.stderr
    assert not (folder / "guest").exists()
    first.send(signal.SIGCONT)
    assert first.wait() == 0


def test_a_target_may_change_when_a_run_goes_on(folder: Path) -> None:
    """The rest of the epoch that a target has cut off is trained then."""
    every = ["--validation_freq_within_epoch", "20"]
    train(folder, "target", *every, "--validation_auroc", "0.51", "--learning_rate", "0.01", "--adagrad")
    lines = read_metrics(folder / "target")
    reached = next(line["step"] for line in lines if line["kind"] == "val" and line["auroc"] >= 0.51)
    assert len(read_losses(folder / "target")) == reached < STEPS
    flags = ["--resume", str(folder / "target"), "--learning_rate", "0.01", "--adagrad"]
    train(folder, "further", *every, *flags, "--validation_auroc", "0.9999")
    assert len(read_losses(folder / "further")) == STEPS
    assert read_summary(folder / "further")["target_reached"] is False
    assert read_summary(folder / "target")["target_reached"] is True


def test_another_batch_size_is_told(folder: Path) -> None:
    unfinished(folder, "smaller", newest=60)
    done = train(folder, "smaller", "--batch_size", "2")
    assert "A step had 4 samples over all ranks and now has 2, at the same learning rate. --batch_size 4" in done.stdout


def test_a_second_signal_ends_at_once(folder: Path) -> None:
    """The first one comes while a batch is read that never arrives, so that there is no step at which to save."""
    running = start(folder, "twice", changes={"dlrm.loader.split.build_batch": _never})
    wait_until(lambda: (folder / "twice" / "metrics.jsonl").exists())
    time.sleep(0.2)
    running.send(signal.SIGTERM)
    wait_until(lambda: "saving a checkpoint" in running.stderr)
    running.send(signal.SIGTERM)  # in the same second: a launcher's
    time.sleep(1.1)
    assert running.process.is_alive()
    running.send(signal.SIGINT)
    assert running.wait(5) == 130
    assert running.stderr.endswith("dlrm: SIGINT again: ended\n")


def _never(*_: Any, **__: Any) -> None:
    while True:
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--checkpoint_dir", "nosuch://place"], "nosuch://place: Protocol not known: nosuch"),
        (["--checkpoint_dir", "s3://bucket/run", "--resume", "never"], "s3://bucket/run: Install s3fs"),
        (["--checkpoint_dir", "/dev/null/here"], "/dev/null/here: can't be written (Not a directory)"),
        (["--checkpoint_dir", "memory://here"], "memory://here: an in-memory store is lost when the process ends"),
        (["--checkpoint_dir", "{run}/metrics.jsonl/here"], "is where the run writes a file"),
    ],
)
def test_a_place_for_checkpoints_that_is_none_is_refused_at_the_start(
    folder: Path, flags: list[str], words: str
) -> None:
    done = train(folder, "nowhere", *(flag.format(run=folder / "nowhere") for flag in flags), code=2)
    assert words in done.stderr
    assert not (folder / "nowhere").exists()


def test_checkpoints_of_another_training_are_left_alone(folder: Path) -> None:
    run_dir = unfinished(folder, "others")
    place = ["--checkpoint_dir", str(run_dir / "checkpoints")]
    before = contents(run_dir)
    for resume in ("never", str(step(run_dir, 5))):
        done = train(folder, "new", *place, "--resume", resume, code=2)
        assert f"{run_dir / 'checkpoints'}: holds step_{STEPS:010d} of another training." in done.stderr
    assert contents(run_dir) == before
    assert not (folder / "new").exists()


def test_a_checkpoint_folder_that_is_not_given_again(folder: Path) -> None:
    run_dir = unfinished(folder, "moved")
    (run_dir / "checkpoints").rename(folder / "place")
    text = (run_dir / "config.json").read_text()
    (run_dir / "config.json").write_text(
        text.replace('"checkpoint_dir": null', f'"checkpoint_dir": "{folder / "place"}"')
    )
    done = train(folder, "moved", code=2)
    assert f"the checkpoints of this run are in {folder / 'place'}. Give --checkpoint_dir" in done.stderr
    train(folder, "moved", "--checkpoint_dir", str(folder / "place"))
    assert read_losses(run_dir) == read_losses(folder / "undisturbed")
