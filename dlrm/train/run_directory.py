"""The run directory: what was asked for, on what it ran, and what came out."""

import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dlrm.artifacts import MANIFEST_NAME, write_atomically, write_json
from dlrm.config import Config
from dlrm.errors import RunDirectoryError
from dlrm.metrics.sinks import reported
from dlrm.runtime import Runtime

_FILES = ("config.json", "environment.json", "plan.json", "metrics.jsonl", "multi_hot_freqs.npz", "summary.json")
_OTHERS = ("mlperf_log.txt", "tensorboard", "trace_rank0.json.gz")
_PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchx", "numpy", "dlrm")


@dataclass(frozen=True)
class RunDirectory:
    """Writes the files of a run. Only rank 0 holds one."""

    path: Path

    @staticmethod
    def check(config: Config) -> Path:
        """The folder a run would use, if it can be made and holds no run yet. Makes nothing.

        Raises:
            RunDirectoryError: if it can't be written, or holds a run already.
        """
        if config.output.run_dir is not None:
            path = Path(config.output.run_dir)
        else:
            name = config.recipe or ("random" if config.is_random else config.data.dataset_name)
            path = _unused(Path("runs", f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"))
        taken = reported(path, lambda: [name for name in (*_FILES, *_OTHERS) if os.path.lexists(path / name)])
        if taken:
            raise RunDirectoryError(
                f"--run_dir {path}: holds a run already ({taken[0]}). Choose another folder, or move this one away."
            )
        folders = (config.data.in_memory_binary_criteo_path, config.data.synthetic_multi_hot_criteo_path)
        if any(folder is not None and path.resolve() == Path(folder).resolve() for folder in folders):
            raise RunDirectoryError(f"--run_dir {path}: is the data's folder. Choose another one.")
        parent = path
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise RunDirectoryError(f"--run_dir {path}: {parent} is not a folder. Choose another one.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise RunDirectoryError(f"--run_dir {path}: no permission to write in {parent}. Choose another one.")
        return path

    @staticmethod
    def create(path: Path, config: Config, environment: Mapping[str, Any], plan: Mapping[str, Any]) -> "RunDirectory":
        """Makes the folder with config.json, environment.json and plan.json.

        Raises:
            RunDirectoryError: if it can't be written.
        """

        def write() -> "RunDirectory":
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / "config.json", config.to_json())
            write_json(path / "environment.json", environment)
            write_json(path / "plan.json", plan)
            return RunDirectory(path)

        try:
            return reported(path, write)
        except RunDirectoryError:
            RunDirectory(path).discard()
            raise

    def discard(self) -> None:
        """Removes what a run has written that can't begin, so that the folder can be used again."""
        with suppress(OSError):
            for name in (*_FILES, "mlperf_log.txt"):  # `check` saw none of them: what is there is ours
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl.

        Raises:
            RunDirectoryError: if the disk is full or the folder is gone.
        """

        def write() -> None:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")

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


def _unused(path: Path) -> Path:
    """`path`, or with -2, -3, ... where another run has begun in the same second."""
    candidates = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(candidate for candidate in candidates if not candidate.exists())


def describe_environment(runtime: Runtime, config: Config) -> dict[str, Any]:
    """What a reader needs to tell this machine, software and data from another."""
    return {
        **describe_software(),
        "host": platform.node(),
        "system": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "world_size": runtime.world_size,
        "local_world_size": runtime.local_world_size,
        "device": device_name(runtime.device),
        "data_manifest_sha256": _manifest_digest(config.data.in_memory_binary_criteo_path),
        "multi_hot_manifest_sha256": _manifest_digest(config.data.synthetic_multi_hot_criteo_path),
    }


def describe_software() -> dict[str, Any]:
    """Versions of what computes, and the commit of this source tree."""
    return {"versions": {"python": platform.python_version(), **_versions()}, "commit": _commit()}


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _versions() -> dict[str, str]:
    installed = {}
    for package in _PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def _commit() -> str | None:
    """Commit of this source tree, with `-dirty` where it has changes; None outside a checkout."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _manifest_digest(folder: str | None) -> str | None:
    if folder is None:
        return None
    manifest = Path(folder, MANIFEST_NAME)
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.exists() else None
