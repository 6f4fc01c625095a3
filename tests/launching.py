"""Starts dlrm_main.py as a user would, and workers for tests that need ranks."""

import json
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).parent.parent
MAIN = str(ROOT / "dlrm_main.py")
BIN = Path(sys.executable).parent
TINY = [
    *("--embedding_dim", "8", "--dense_arch_layer_sizes", "16,8", "--over_arch_layer_sizes", "16,1"),
    *("--num_embeddings", "64", "--learning_rate", "0.1", "--no_print_progress"),
]
"""Flags of a model that starts fast."""


def run(command: Sequence[str], timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command from the repository's root and waits."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        list(command),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment},
        check=False,
    )


def run_main(*flags: str, ranks: int = 1, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python dlrm_main.py FLAGS`, or torchrun with that many ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--rdzv_backend", "c10d"]
        launcher += ["--rdzv_endpoint", "localhost:0"]
    return run([*launcher, MAIN, *flags], timeout, **environment)


def launch(worker: Callable[..., Any], ranks: int, *arguments: Any, folder: Path) -> dict[int, Any]:
    """Calls `worker(*arguments)` on each rank under torch's elastic agent; returns each rank's result."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint=str(folder / "rdzv"),
        rdzv_configs={"store_type": "file"},
        start_method="spawn",
        monitor_interval=0.1,
        max_restarts=0,
    )
    return elastic_launch(config, worker)(*arguments)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_losses(run_dir: Path) -> list[float]:
    """Loss of each reported step; with --log_every 1, of each step."""
    return [line["loss"] for line in read_metrics(run_dir) if line["kind"] == "train"]


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json."""
    return json.loads((run_dir / "summary.json").read_text())


def take_port() -> socket.socket:
    """A listening socket on loopback: its port is in use until it is closed."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener
