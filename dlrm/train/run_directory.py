"""The run directory: what was asked for, on what it ran, and what came out."""

import hashlib
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dlrm.checkpoint.manifest import step_of
from dlrm.config.config import Config
from dlrm.dataset.cautions import Folded
from dlrm.dataset.manifest import MANIFEST_NAME, read_vocabulary
from dlrm.errors import DatasetError, RunDirectoryError
from dlrm.metrics.sinks import reported, unwritable
from dlrm.ranks.runtime import Runtime
from dlrm.system.environment import describe_software
from dlrm.system.files import write_atomically, write_json
from dlrm.system.lock import LOCK, Locks

_FILES = ("config.json", "environment.json", "plan.json", "metrics.jsonl", "multi_hot_freqs.npz", "summary.json")
_OTHERS = ("mlperf_log.txt", "tensorboard", "trace_rank0.json.gz")
DOCUMENTS = ("config.json", "environment.json", "plan.json", "metrics.jsonl")
"""What a checkpoint holds a copy of."""


@dataclass(frozen=True)
class RunDirectory:
    """Writes the files of a run, on rank 0. The others know where it is."""

    path: Path

    @staticmethod
    def locate(config: Config) -> Path:
        """The folder that a run uses: what the flag says, that of the launch that this process is a restart of, or a
        new one named by the time."""
        if config.output.run_dir is not None:
            return Path(config.output.run_dir)
        if (launch := launch_id()) is not None:
            for path in sorted(Path("runs").glob("*/"), reverse=True):
                if RunDirectory(path)._launch() == launch:
                    return path
        name = config.recipe or ("random" if config.is_random else config.data.dataset_name)
        return Path("runs", f"{time.strftime('%Y%m%d-%H%M%S')}-{name}")

    @staticmethod
    def claim(path: Path, config: Config, locks: Locks) -> Path:
        """Makes the folder if its name is the default one, with -2, -3, ... if other runs begin in the same second.

        A folder that is named, or that this launch has begun, stays as it is. One that is still empty when `locks` are
        given back is removed.

        Raises:
            RunDirectoryError: if it can't be made.
        """
        if config.output.run_dir is not None or RunDirectory(path)._is_this_launchs():
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
        """Whether this process is a launcher's or a scheduler's restart of a run.

        Launchers count restarts of their own host. One that others make necessary, as a host that is lost does, they do
        not count: then the folder tells.
        """
        names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
        if any(os.environ.get(name, "0") != "0" for name in names):
            return True
        return self._is_this_launchs()

    def _is_this_launchs(self) -> bool:
        return (launch := launch_id()) is not None and self._launch() == launch

    def _launch(self) -> str | None:
        with suppress(OSError, ValueError, AttributeError):
            return json.loads((self.path / "environment.json").read_text(encoding="utf-8")).get("launch")
        return None

    @staticmethod
    def check(path: Path, config: Config, *, may_resume: bool) -> bool:
        """Whether the folder holds a run that has not finished. Makes nothing.

        Raises:
            RunDirectoryError: if it can't be written, holds a finished run, or one that is not to be resumed.
        """
        if any(step_of(part) is not None for part in Path(os.path.realpath(path)).parts):
            raise RunDirectoryError(
                f"--run_dir {path}: is or lies in a checkpoint. To train on from one: --resume, and another --run_dir."
            )
        taken = reported(path, lambda: [name for name in (*_FILES, *_OTHERS) if os.path.lexists(path / name)])
        if taken and not may_resume:
            raise RunDirectoryError(
                f"--run_dir {path}: holds a run already ({taken[0]}). Choose another folder, move this one away, or "
                "go on with --resume auto."
            )
        if "summary.json" in taken:
            raise RunDirectoryError(
                f"--run_dir {path}: holds a finished run (summary.json). Choose another folder, or move this one away. "
                "To train on from it: --resume PATH, and another --run_dir."
            )
        folders = (config.data.in_memory_binary_criteo_path, config.data.synthetic_multi_hot_criteo_path)
        if any(folder is not None and os.path.realpath(path) == os.path.realpath(folder) for folder in folders):
            raise RunDirectoryError(f"--run_dir {path}: is the data's folder. Choose another one.")
        _check_place(path)
        return bool(taken)

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

        What a run without a checkpoint has left there is moved into attempt-1, attempt-2, ...

        Args:
            locks: what this process has of folders. A folder that was there already is among them; a new one joins.
            metrics: lines of metrics.jsonl that a checkpoint brings; None for a new run.

        Raises:
            RunDirectoryError: if it can't be written, or another run has taken it.
        """

        is_new = not locks.holds(path)

        def write() -> "RunDirectory":
            path.mkdir(parents=True, exist_ok=True)
            directory = RunDirectory(path)
            if is_new:
                locks.take(path, f"--run_dir {path}")
                if (path / "config.json").exists():
                    raise RunDirectoryError(
                        f"--run_dir {path}: another run has just begun there. Choose another folder."
                    )
            if metrics is None:
                directory._move_aside()
            else:
                write_atomically(path / "metrics.jsonl", lambda file: file.write(metrics))
                shutil.rmtree(path / "tensorboard", ignore_errors=True)
            write_json(path / "config.json", config.to_json())
            write_json(path / "environment.json", environment)
            write_json(path / "plan.json", plan)
            return directory

        try:
            return write()
        except OSError as error:
            if metrics is None and is_new:
                RunDirectory(path).discard()
            raise unwritable(path, error) from None

    def _move_aside(self) -> None:
        """Files of an earlier attempt, so that none of them is lost or taken for this one's."""
        old = [name for name in (*_FILES, *_OTHERS) if os.path.lexists(self.path / name)]
        if not old:
            return
        attempt = next(
            folder
            for folder in (self.path / f"attempt-{number}" for number in itertools.count(1))
            if not folder.exists()
        )
        attempt.mkdir()
        for name in old:
            (self.path / name).rename(attempt / name)

    def has_file(self, path: Path) -> bool:
        """Whether a path is one of the files that a run writes, or lies below one."""
        own, other = Path(os.path.realpath(self.path)), Path(os.path.realpath(path))
        return any(other.is_relative_to(own / name) for name in (*_FILES, *_OTHERS))

    def discard(self) -> None:
        """Removes what a run has written that can't begin, so that the folder can be used again."""
        with suppress(OSError):
            for name in (*_FILES, "mlperf_log.txt", LOCK):  # `check` saw none of them: what is there is ours
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)

    def documents(self) -> dict[str, bytes]:
        """Files that a checkpoint holds a copy of.

        Raises:
            RunDirectoryError: if one can't be read.
        """
        return reported(self.path, lambda: {name: (self.path / name).read_bytes() for name in DOCUMENTS})

    def lines(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl, whole or not at all.

        Raises:
            RunDirectoryError: if the disk is full or the folder is gone.
        """

        text = (json.dumps(line, allow_nan=False) + "\n").encode()

        def write() -> None:
            with (self.path / "metrics.jsonl").open("ab", buffering=0) as file:
                whole = file.tell()
                left = memoryview(text)
                try:
                    while left:
                        left = left[file.write(left) :]
                except OSError:
                    file.truncate(whole)
                    raise

        reported(self.path, write)

    def write_frequencies(self, counts: Mapping[str, npt.NDArray[np.int64]]) -> None:
        """Writes multi_hot_freqs.npz.

        Raises:
            RunDirectoryError: if the disk is full or the folder is gone.
        """
        path = self.path / "multi_hot_freqs.npz"
        reported(self.path, lambda: write_atomically(path, lambda file: np.savez(file, **counts)))  # type: ignore[arg-type]

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, the last file of a finished run.

        Raises:
            RunDirectoryError: if the disk is full or the folder is gone.
        """
        reported(self.path, lambda: write_json(self.path / "summary.json", summary))


def launch_id() -> str | None:
    """What the ranks of one torchrun on this host have in common, restarts included; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    with suppress(OSError):
        started = (
            Path(f"/proc/{os.getppid()}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()[19]
        )
        return f"{platform.node()} {os.getppid()} {started}"
    return None


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


def describe_environment(
    runtime: Runtime, config: Config, data: str | None, folded: Sequence[Folded] = ()
) -> dict[str, Any]:
    """What a reader needs to tell this machine, software and data from another.

    Args:
        folded: shares of ids beyond their tables, in each part of the data.
    """
    return {
        **describe_software(),
        "host": platform.node(),
        "system": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "launch": launch_id(),
        "world_size": runtime.world_size,
        "local_world_size": runtime.local_world_size,
        "device": runtime.device_name,
        "data_fingerprint": data,
        "data_manifest_sha256": _manifest_digest(config.data.in_memory_binary_criteo_path),
        "multi_hot_manifest_sha256": _manifest_digest(config.data.synthetic_multi_hot_criteo_path),
        "vocabulary_sha256": _vocabulary(config.data.folder),
        "folded_ids": {part.name: [round(share, 4) for share in part.shares_F.tolist()] for part in folded},
    }


def _vocabulary(folder: str | None) -> str | None:
    with suppress(DatasetError):
        return None if folder is None else read_vocabulary(Path(folder))
    return None


def _manifest_digest(folder: str | None) -> str | None:
    if folder is None:
        return None
    manifest = Path(folder, MANIFEST_NAME)
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.exists() else None
