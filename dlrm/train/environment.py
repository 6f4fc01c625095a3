"""What a run ran on: the content of environment.json."""

import hashlib
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dlrm.config.config import Config
from dlrm.dataset.cautions import Folded
from dlrm.dataset.manifest import MANIFEST_NAME, read_vocabulary
from dlrm.errors import DatasetError
from dlrm.ranks.runtime import Runtime
from dlrm.system.environment import describe_software


def describe_environment(
    runtime: Runtime, config: Config, data: str | None, folded: Sequence[Folded] = ()
) -> dict[str, Any]:
    """What a reader needs to tell this machine, software and data from another.

    Args:
        data: digest of the data; None for random data.
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


def launch_id() -> str | None:
    """Names one launch by torchrun on this host: the same for all its ranks and restarts. None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    with suppress(OSError):
        stat = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8", errors="replace")
        started = stat.rpartition(")")[2].split()[19]  # the name in parentheses may contain spaces
        return f"{platform.node()} {os.getppid()} {started}"
    return None


def _vocabulary(folder: str | None) -> str | None:
    with suppress(DatasetError):
        return None if folder is None else read_vocabulary(Path(folder))
    return None


def _manifest_digest(folder: str | None) -> str | None:
    if folder is None:
        return None
    manifest = Path(folder, MANIFEST_NAME)
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.exists() else None
