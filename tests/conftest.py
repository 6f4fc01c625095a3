"""Warnings are errors in tests; what the libraries warn of while they load is theirs (2026-11-22: torch 2.13, torchrec
1.8, fbgemm-gpu 1.8 on a CPU name modules that only the CUDA build has)."""

import importlib
import os
import resource
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for module in ("torch.distributed.optim", "torchrec.datasets.criteo", "torchrec.models.dlrm", "torchmetrics"):
        importlib.import_module(module)

CRITEO = Path(__file__).parent.parent.parent / "shared" / "criteo"


@pytest.fixture(scope="session")
def criteo_folder() -> Path:
    """Real Criteo rows; skips where they are not at hand."""
    if not CRITEO.is_dir():
        pytest.skip(f"{CRITEO} is absent: real Criteo rows can't be redistributed")
    return CRITEO


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("size=1m")` mounts a small disk, or changes the one it has mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> Path:
        again = "remount," if disk.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{again}{options}", "tmpfs", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode and not again:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        return disk

    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    yield mount
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """`ulimit -f`, for a while. Python ignores SIGXFSZ, so that a write fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
