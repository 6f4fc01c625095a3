"""The run directory: what was asked for, what it ran on, and what came out."""

import itertools
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.checkpoint import run_files
from dlrm.checkpoint.manifest import step_of
from dlrm.config.config import Config
from dlrm.errors import RunDirectoryError
from dlrm.metrics.sinks import reported, unwritable
from dlrm.system.files import write_atomically, write_json
from dlrm.system.lock import LOCK, Locks
from dlrm.train.environment import launch_id

# Launchers and schedulers count the restarts of a run in these variables.
_RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@dataclass(frozen=True)
class RunDirectory:
    """A run's folder. Rank 0 writes its files; the other ranks only know where it is.

    In the order of a run: `locate` and `claim` choose the folder, `check` refuses one that can't be used, `open` writes
    what is known before training, `append_metrics` and the other writers what comes out of it.
    """

    path: Path

    @staticmethod
    def locate(config: Config) -> Path:
        """The folder that a run uses.

        That is --run_dir; without it the folder of this very launch, if the process is a restart; else a new one named
        by the time.
        """
        if config.output.run_dir is not None:
            return Path(config.output.run_dir)
        if launch_id() is not None:
            for path in sorted(Path("runs").glob("*/"), reverse=True):
                if RunDirectory(path)._was_begun_by_this_launch():
                    return path
        name = config.recipe or ("random" if config.is_random else config.data.dataset_name)
        return Path("runs", f"{time.strftime('%Y%m%d-%H%M%S')}-{name}")

    @staticmethod
    def claim(path: Path, config: Config, locks: Locks) -> Path:
        """Makes the folder if its name is the default one, with -2, -3, ... if other runs begin in the same second.

        A folder that --run_dir names, or that this launch has begun, stays as it is. A folder that is still empty when
        `locks` are given back is removed.

        Raises:
            RunDirectoryError: if it can't be made.
        """
        if config.output.run_dir is not None or RunDirectory(path)._was_begun_by_this_launch():
            return path
        _check_place(path)
        names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(2)))
        is_first = not path.parent.exists()
        claimed = reported(path, lambda: next(filter(_make, map(path.with_name, names))))
        if is_first:
            locks.callback(_remove_empty, path.parent)
        locks.callback(_remove_empty, claimed)
        return claimed

    def is_of_this_launch(self) -> bool:
        """Whether this process is a launcher's or a scheduler's restart of the run in this folder.

        A launcher counts the restarts that its own host makes necessary. It does not count those that another host
        does, for example one that is lost: then environment.json tells.
        """
        if any(os.environ.get(name, "0") != "0" for name in _RESTART_COUNTS):
            return True
        return self._was_begun_by_this_launch()

    def _was_begun_by_this_launch(self) -> bool:
        launch = launch_id()
        if launch is None:
            return False
        with suppress(OSError, ValueError, AttributeError):
            text = (self.path / run_files.ENVIRONMENT).read_text(encoding="utf-8")
            return json.loads(text).get("launch") == launch
        return False

    def check(self, config: Config, *, may_resume: bool) -> None:
        """Refuses a folder that this run can't use. Makes nothing.

        Args:
            may_resume: whether the folder may hold a run that has not finished.

        Raises:
            RunDirectoryError: if it can't be written, holds a finished run, or one that is not to be resumed.
        """
        path = self.path
        if any(step_of(part) is not None for part in Path(os.path.realpath(path)).parts):
            raise RunDirectoryError(
                f"--run_dir {path}: is or lies in a checkpoint. To continue training from one: --resume, and another "
                "--run_dir."
            )
        taken = self._files()
        if taken and not may_resume:
            raise RunDirectoryError(
                f"--run_dir {path}: holds a run already ({taken[0]}). Choose another folder, move this one away, or "
                "continue with --resume auto."
            )
        if run_files.SUMMARY in taken:
            raise RunDirectoryError(
                f"--run_dir {path}: holds a finished run (summary.json). Choose another folder, or move this one away. "
                "To continue training from it: --resume PATH, and another --run_dir."
            )
        folders = (config.data.in_memory_binary_criteo_path, config.data.synthetic_multi_hot_criteo_path)
        if any(folder is not None and os.path.realpath(path) == os.path.realpath(folder) for folder in folders):
            raise RunDirectoryError(f"--run_dir {path}: is the data's folder. Choose another one.")
        _check_place(path)

    def holds_run(self) -> bool:
        """Whether there is a run, finished or not."""
        return bool(self._files())

    def is_finished(self) -> bool:
        """Whether there is a run that has finished."""
        return (self.path / run_files.SUMMARY).exists()

    def _files(self) -> list[str]:
        """Those of a run's files that are there, links that lead nowhere included."""
        return [name for name in run_files.ALL if os.path.lexists(self.path / name)]

    @staticmethod
    def open(
        path: Path,
        config: Config,
        environment: Mapping[str, Any],
        plan: Mapping[str, Any],
        locks: Locks,
        metrics: bytes | None,
    ) -> "RunDirectory":
        """Makes the folder with config.json, environment.json and plan.json.

        The files of an earlier run without a checkpoint are moved into attempt-1, attempt-2, ...

        Args:
            locks: the folders that this process has locked. A folder that was there already is among them; a new one is
                added.
            metrics: the lines of metrics.jsonl that a checkpoint has kept; None for a new run.

        Raises:
            RunDirectoryError: if it can't be written, or if another run has taken it.
        """
        directory, is_new = RunDirectory(path), not locks.holds(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if is_new:
                directory._lock(locks)
            if metrics is None:
                directory._move_aside()
            else:
                directory._go_back_to(metrics)
            write_json(path / run_files.CONFIG, config.to_json())
            write_json(path / run_files.ENVIRONMENT, environment)
            write_json(path / run_files.PLAN, plan)
        except OSError as error:
            if metrics is None and is_new:
                directory.discard()
            raise unwritable(path, error) from None
        return directory

    def _lock(self, locks: Locks) -> None:
        """Locks a folder that was not there when the run was checked."""
        locks.take(self.path, f"--run_dir {self.path}")
        if (self.path / run_files.CONFIG).exists():
            raise RunDirectoryError(f"--run_dir {self.path}: another run has just begun there. Choose another folder.")

    def _move_aside(self) -> None:
        """Moves files of an earlier attempt, so that none of them is lost or taken for this one's."""
        old = self._files()
        if not old:
            return
        folders = (self.path / f"attempt-{number}" for number in itertools.count(1))
        attempt = next(folder for folder in folders if not folder.exists())
        attempt.mkdir()
        for name in old:
            (self.path / name).rename(attempt / name)

    def _go_back_to(self, metrics: bytes) -> None:
        """Drops what was measured after the checkpoint that the run is resumed from."""
        write_atomically(self.path / run_files.METRICS, lambda file: file.write(metrics))
        shutil.rmtree(self.path / run_files.TENSORBOARD, ignore_errors=True)

    def has_file(self, path: Path) -> bool:
        """Whether a path is one of the files that a run writes, or lies below one."""
        own, other = Path(os.path.realpath(self.path)), Path(os.path.realpath(path))
        return any(other.is_relative_to(own / name) for name in run_files.ALL)

    def discard(self) -> None:
        """Removes what was written by a run that can't begin, so that the folder can be used again."""
        with suppress(OSError):
            for name in (*run_files.ALL, LOCK):  # `check` saw none of them: what is there is ours
                if (path := self.path / name).is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def documents(self) -> dict[str, bytes]:
        """The files that a checkpoint holds a copy of.

        Raises:
            RunDirectoryError: if one can't be read.
        """
        return reported(self.path, lambda: {name: (self.path / name).read_bytes() for name in run_files.DOCUMENTS})

    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; none if the file is not there."""
        path = self.path / run_files.METRICS
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl, whole or not at all.

        Raises:
            RunDirectoryError: if the disk is full or the folder is gone.
        """
        text = (json.dumps(line, allow_nan=False) + "\n").encode()
        reported(self.path, lambda: _append(self.path / run_files.METRICS, text))

    def write_frequencies(self, counts: Mapping[str, npt.NDArray[np.int64]]) -> None:
        """Writes multi_hot_freqs.npz.

        Raises:
            RunDirectoryError: if the disk is full or the folder is gone.
        """
        path = self.path / run_files.FREQUENCIES
        reported(self.path, lambda: write_atomically(path, lambda file: np.savez(file, **counts)))  # type: ignore[arg-type]

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, the last file of a finished run.

        Raises:
            RunDirectoryError: if the disk is full or the folder is gone.
        """
        reported(self.path, lambda: write_json(self.path / run_files.SUMMARY, summary))


def _check_place(path: Path) -> None:
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise RunDirectoryError(f"--run_dir {path}: {parent} is not a folder. Choose another one.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunDirectoryError(f"--run_dir {path}: no permission to write in {parent}. Choose another one.")


def _make(path: Path) -> bool:
    """Makes a folder; False if it is there, or if the run that made the folder above it has just removed that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except (FileExistsError, FileNotFoundError):
        return False
    return True


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _append(path: Path, text: bytes) -> None:
    """Adds all of `text` to a file, or none of it if the disk gets full."""
    with path.open("ab", buffering=0) as file:
        whole = file.tell()
        left = memoryview(text)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(whole)
            raise
