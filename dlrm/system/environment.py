"""The software that a result comes from."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchx", "numpy", "dlrm")


def describe_software() -> dict[str, Any]:
    """Versions of what computes, and the commit of this source tree."""
    return {"versions": {"python": platform.python_version(), **_versions()}, "commit": _commit()}


def _versions() -> dict[str, str]:
    installed = {}
    for package in _PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def _commit() -> str | None:
    """Commit of this source tree, with `-dirty` if it has changes; None outside a checkout."""
    try:
        git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]  # killed, it would leave its lock
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
