"""Two hosts, each a network namespace with an address and a host name of its own, and a cable that can be pulled."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.distributed.test_faults import write_days
from tests.launching import BIN, MAIN, ROOT, TINY, read_losses, read_summary, wait_until

STEPS = 200
PORT = 29512
ADDRESSES = ("10.79.0.1", "10.79.0.2")
PATIENCE = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=4"
FLAGS = [*TINY, "--batch_size", "4", "--seed", "1", "--checkpoint_every", "5", "--log_every", "1"]

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may make network namespaces"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="no ip command: install iproute2"),
]


class Host:
    """One of two hosts; `start` runs a launcher on it."""

    def __init__(self, number: int, prefix: str, folder: Path) -> None:
        self.number = number
        self.name = f"{prefix}{number}"
        self._hosts = folder / "hosts"

    def start(self, log: Path, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """A command that sees the host's name, its address and no other network."""
        inside = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'
        prefix = ["nsenter", f"--net=/run/netns/{self.name}", "unshare", "--mount", "--uts", "sh", "-c", inside]
        with log.open("wb") as file:
            return subprocess.Popen(
                [*prefix, str(self._hosts), self.name, *command],
                stdout=file,
                stderr=file,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )

    def set_link(self, state: str) -> None:
        """Plugs its cable in (`up`) or pulls it (`down`)."""
        ip("-n", self.name, "link", "set", "eth0", state)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    prefix = f"dlrm{os.getpid()}h"
    pair = Host(1, prefix, tmp_path), Host(2, prefix, tmp_path)
    lines = [f"{address} {host.name}" for address, host in zip(ADDRESSES, pair, strict=True)]
    (tmp_path / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    try:
        try:
            for host in pair:
                ip("netns", "add", host.name)
            ends = [("eth0", "netns", host.name) for host in pair]
            ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces can be made here: {error.stderr.decode().strip()}")
        for host, address in zip(pair, ADDRESSES, strict=True):
            ip("-n", host.name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "lo", "up")
            host.set_link("up")
        yield pair
    finally:
        for host in pair:
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)


class Job:
    """A training on both hosts."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path, run: str, nnodes: str, *more: str) -> None:
        self.run_dir = folder / run
        self.logs = [folder / f"{run}-{host.number}.log" for host in hosts]
        launcher = [str(BIN / "torchrun"), "--monitor-interval", "0.1", "--nnodes", nnodes, "--nproc_per_node", "1"]
        launcher += ["--rdzv_backend", "c10d", "--rdzv_id", run, "--rdzv_endpoint", f"{hosts[0].name}:{PORT}"]
        launcher += ["--rdzv_conf", PATIENCE, "--max-restarts", "3"]
        flags = [*FLAGS, "--in_memory_binary_criteo_path", str(folder / "days"), "--run_dir", str(self.run_dir), *more]
        self.launchers = [host.start(log, *launcher, MAIN, *flags) for host, log in zip(hosts, self.logs, strict=True)]

    @property
    def output(self) -> str:
        """What both hosts have said."""
        return "".join(log.read_text() for log in self.logs)

    def wait_for_step(self, step: int) -> None:
        def is_there() -> bool:
            assert all(launcher.poll() is None for launcher in self.launchers), self.output
            return (self.run_dir / "metrics.jsonl").exists() and len(read_losses(self.run_dir)) >= step

        wait_until(is_there)

    def kill(self, number: int) -> None:
        """All of it on one host, at once."""
        launcher = psutil.Process(self.launchers[number].pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            process.send_signal(signal.SIGKILL)
        self.launchers[number].wait()

    def end(self) -> None:
        for number, launcher in enumerate(self.launchers):
            if launcher.poll() is None:
                self.kill(number)


Start = Callable[..., Job]


@pytest.fixture
def start(hosts: tuple[Host, Host], tmp_path: Path) -> Iterator[Start]:
    """`start(run, nnodes, *flags)`"""
    write_days(tmp_path / "days", (STEPS * 8, 40))
    jobs: list[Job] = []

    def launch(run: str, nnodes: str, *flags: str) -> Job:
        jobs.append(Job(hosts, tmp_path, run, nnodes, *flags))
        return jobs[-1]

    yield launch
    for job in jobs:
        job.end()


def test_two_hosts_and_a_cable_that_is_pulled_for_a_while(start: Start, hosts: tuple[Host, Host]) -> None:
    undisturbed = start("undisturbed", "2")
    assert [launcher.wait(300) for launcher in undisturbed.launchers] == [0, 0], undisturbed.output
    assert "2 ranks on 2 hosts" in undisturbed.output
    job = start("pulled", "2")
    job.wait_for_step(20)
    hosts[1].set_link("down")
    time.sleep(1)
    before = len(read_losses(job.run_dir))
    time.sleep(1)
    assert len(read_losses(job.run_dir)) == before < STEPS
    hosts[1].set_link("up")
    assert [launcher.wait(300) for launcher in job.launchers] == [0, 0], job.output
    assert read_losses(job.run_dir) == read_losses(undisturbed.run_dir)
    assert read_summary(job.run_dir)["test_logloss"] == read_summary(undisturbed.run_dir)["test_logloss"]


def test_a_host_that_goes_without_a_word(start: Start, hosts: tuple[Host, Host]) -> None:
    """As in a power cut. torchrun looks for lost hosts only when a rank ends: the watchdog has to see to that."""
    job = start("lost", "1:2", "--hang_timeout", "8")
    wait_until(lambda: any(job.run_dir.glob("checkpoints/step_*")))
    hosts[1].set_link("down")  # no connection is closed: the other host hears nothing at all
    job.kill(1)
    assert job.launchers[0].wait(300) == 0, job.output
    summary = read_summary(job.run_dir)
    assert (summary["world_size"], summary["num_train_samples"]) == (1, STEPS * 8)
    resumed = job.logs[0].read_text().split("Resuming from ")[1].splitlines()[0]
    assert resumed.endswith("written by 2 ranks.")
    assert f"rank 1 on {hosts[1].name} gives no sign of life" in job.output


def test_ranks_whose_launcher_does_not_say_who_shares_a_host(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """As in Kubeflow's pods, which have RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and here on unequal hosts."""
    write_days(tmp_path / "days", (60, 12))
    log = tmp_path / "log"
    flags = [*FLAGS, "--in_memory_binary_criteo_path", str(tmp_path / "days"), "--run_dir", str(tmp_path / "run")]
    meeting = {"WORLD_SIZE": "3", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT)}
    processes = [
        host.start(log.with_suffix(f".{rank}"), sys.executable, MAIN, *flags, RANK=str(rank), **meeting)
        for rank, host in enumerate((hosts[0], hosts[0], hosts[1]))
    ]
    said = [(process.wait(300), log.with_suffix(f".{rank}").read_text()) for rank, process in enumerate(processes)]
    assert [code for code, _ in said] == [0, 0, 0], said
    assert "3 ranks on 2 hosts (2, 1), cpu, gloo" in said[0][1]
    assert read_summary(tmp_path / "run")["num_train_samples"] == 60
