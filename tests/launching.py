"""Starts dlrm_main.py as a user would, and workers for tests that need ranks."""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
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


def run(command: Sequence[str], timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
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


def run_main(*flags: str, ranks: int = 1, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python dlrm_main.py FLAGS`, or torchrun with that many ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--rdzv_backend", "c10d"]
        launcher += ["--rdzv_endpoint", "localhost:0"]
    return run([*launcher, MAIN, *flags], timeout, **environment)


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.launching", "dlrm.train.run"])


class Fork:
    """`python dlrm_main.py FLAGS` forked off a process that has imported everything: it starts in a second."""

    def __init__(self, log: Path, *flags: str, changes: Mapping[str, Any] | None = None) -> None:
        """Starts it.

        Args:
            log: a file for what it says on stdout; stderr goes to another one beside it.
            changes: values for names in modules, as in `{"dlrm.system.lock._SECONDS": 1.0}`.
        """
        self._files = (log, log.with_suffix(".err"))
        for file in self._files:
            file.write_bytes(b"")
        self.process = _FORKS.Process(target=_main, args=(flags, *map(str, self._files), dict(changes or {})))
        self.process.start()

    @property
    def stdout(self) -> str:
        """What it has said."""
        return self._files[0].read_text()

    @property
    def stderr(self) -> str:
        """What it has said of errors."""
        return self._files[1].read_text()

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 60) -> int:
        """Waits for its end; gives the exit code, negative for a signal."""
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still there after {timeout:g} s: {self.stdout}{self.stderr}")
        return code


def _main(flags: Sequence[str], stdout: str, stderr: str, changes: Mapping[str, Any]) -> None:
    for path, number in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    from dlrm.cli import main

    for name, value in changes.items():
        module, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    sys.exit(main(["train", *flags]))


def wait_until(condition: Callable[[], bool], timeout: float = 300) -> None:
    """Waits for something that another process does."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


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
        start_method="forkserver",  # what takes long to import is there already
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
