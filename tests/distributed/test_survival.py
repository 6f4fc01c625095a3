"""Ranks and launchers that are stopped, killed, hung or short of room: nothing is lost, the same command goes on."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import psutil
import pytest

from tests.distributed.test_faults import write_days
from tests.launching import BIN, MAIN, ROOT, TINY, read_losses, read_metrics, read_summary, take_port, wait_until

STEPS = 200
FLAGS = [*TINY, "--batch_size", "4", "--seed", "1", "--checkpoint_every", "5", "--log_every", "1"]
ALONE = ("--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0")


class Job:
    """A training that torchrun starts. Its places are those of a run of that name in `folder`."""

    def __init__(self, folder: Path, run: str, *flags: str, launcher: tuple[str, ...] = ALONE, log: str = "") -> None:
        self.run_dir = folder / run
        self._log = folder / f"{run}{log}.log"
        places = ["--in_memory_binary_criteo_path", str(folder / "days"), "--run_dir", str(self.run_dir)]
        with self._log.open("ab") as file:
            self._from = file.tell()
            self.process = subprocess.Popen(
                [str(BIN / "torchrun"), "--monitor-interval", "0.1", *launcher, MAIN, *FLAGS, *places, *flags],
                stdout=file,
                stderr=file,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self._ranks: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        """What launcher and ranks have said."""
        return self._log.read_bytes()[self._from :].decode()

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes that train now, by rank."""
        children = psutil.Process(self.process.pid).children()
        found = ((child.environ().get("RANK"), child) for child in children if MAIN in child.cmdline())
        ranks = {int(rank): child for rank, child in found if rank is not None}  # None: not quite started
        self._ranks |= {child.pid: child for child in ranks.values()}
        return ranks

    def wait_for_step(self, step: int) -> None:
        """Waits until so many steps are reported."""
        path = self.run_dir / "metrics.jsonl"

        def is_there() -> bool:
            assert self.process.poll() is None, self.output
            return path.exists() and sum(line["kind"] == "train" for line in read_metrics(self.run_dir)) >= step

        wait_until(is_there)
        self.ranks()

    def wait(self, timeout: float = 300) -> int:
        """The launcher's exit code, once it and all ranks are gone."""
        code = self.process.wait(timeout)
        assert not psutil.wait_procs(list(self._ranks.values()), timeout)[1], self.output
        return code

    def end(self) -> None:
        """Leaves nothing of it running."""
        if self.process.poll() is None:
            self.ranks()
            self.process.kill()
            self.process.wait()
        for rank in self._ranks.values():
            if rank.is_running():
                rank.kill()


Launch = Callable[..., Job]


@pytest.fixture
def start(folder: Path) -> Iterator[Launch]:
    """`start(run, *flags)` starts a job."""
    jobs: list[Job] = []

    def launch(run: str, *flags: str, launcher: tuple[str, ...] = ALONE, log: str = "") -> Job:
        jobs.append(Job(folder, run, *flags, launcher=launcher, log=log))
        return jobs[-1]

    yield launch
    for job in jobs:
        job.end()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Binary days for so many steps of two ranks."""
    folder = tmp_path_factory.mktemp("survival")
    write_days(folder / "days", (STEPS * 8, 40))
    return folder


def newest(run_dir: Path) -> Path:
    return max(run_dir.glob("checkpoints/step_*"))


def outcome(run_dir: Path) -> tuple[list[float], float, list[str]]:
    """Losses, the test's loss, and digests of the last checkpoint's tensors."""
    digests = [sha256(path.read_bytes()).hexdigest() for path in sorted(newest(run_dir).glob("rank_*.bin"))]
    return read_losses(run_dir), read_summary(run_dir)["test_logloss"], digests


def test_whatever_ends_a_job_it_goes_on_to_the_same_end(start: Launch) -> None:
    undisturbed = start("undisturbed")
    assert undisturbed.wait() == 0, undisturbed.output

    job = start("disturbed")
    job.wait_for_step(8)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() != 0  # torchrun's own code; ranks end with 143
    stopped = len(read_losses(job.run_dir))
    assert f"dlrm: SIGTERM: stopped after step {stopped}, which is saved." in job.output
    assert newest(job.run_dir).name == f"step_{stopped:010d}"

    job = start("disturbed")
    job.wait_for_step(stopped + 8)
    assert f"Resuming from {job.run_dir}/checkpoints/step_{stopped:010d}" in job.output
    job.ranks()[1].send_signal(signal.SIGUSR1)
    assert job.wait() != 0
    warned = len(read_losses(job.run_dir))
    assert f"dlrm: SIGUSR1: stopped after step {warned}, which is saved." in job.output
    assert "exitcode  : 138 " in job.output  # torchrun ends the other one as soon as the first has left
    assert newest(job.run_dir).name == f"step_{warned:010d}"

    job = start("disturbed")
    job.wait_for_step(warned + 8)
    job.process.kill()  # nobody is left to tell the ranks, but the kernel
    assert job.wait(30) == -signal.SIGKILL
    saved = len(read_losses(job.run_dir))
    assert newest(job.run_dir).name == f"step_{saved:010d}"
    assert stopped < warned < saved < STEPS

    job = start("disturbed", launcher=("--max-restarts", "1", *ALONE))
    job.wait_for_step(saved + 8)
    job.ranks()[1].kill()
    assert job.wait() == 0, job.output
    starts = [line for line in job.output.splitlines() if line.startswith("Resuming from")]
    steps = [int(line.split("step_")[1][:10]) for line in starts]
    assert len(steps) == 2
    assert steps[0] == saved <= steps[1]
    assert outcome(job.run_dir) == outcome(undisturbed.run_dir)


def test_ranks_that_are_still_starting_end_with_their_launcher(start: Launch) -> None:
    job = start("orphans")
    wait_until(lambda: len(job.ranks()) == 2 and all(map(has_torch, job.ranks().values())))
    job.process.kill()
    assert job.wait(20) == -signal.SIGKILL
    assert not job.run_dir.exists()


def has_torch(rank: psutil.Process) -> bool:
    """Whether it has begun to load torch, which takes seconds."""
    return any("libtorch_cpu" in mapped.path for mapped in rank.memory_maps())


def test_a_rank_that_hangs_is_named_and_one_that_is_slow_is_not(start: Launch) -> None:
    job = start("hung", "--hang_timeout", "8", "--epochs", "1000")
    job.wait_for_step(5)
    rank = job.ranks()[1]
    rank.suspend()
    time.sleep(3)
    rank.resume()
    reached = len(read_losses(job.run_dir))
    job.wait_for_step(reached + 5)
    rank.suspend()
    wait_until(lambda: "(--hang_timeout)" in job.output)
    rank.resume()  # so that torchrun can end it at once, and not after half a minute
    assert job.wait() != 0
    lines = [line for line in job.output.splitlines() if line.startswith("dlrm: error")]
    assert len(lines) == 1
    assert lines[0].startswith(f"dlrm: error: no step for 8 s (--hang_timeout): rank 1 on {os.uname().nodename} ")
    assert "gives no sign of life" in lines[0]
    assert "exitcode  : 3 " in job.output


def test_a_lost_host_leaves_the_others_to_go_on(start: Launch) -> None:
    """Two launchers on one host; what a user gives to torchrun on each host is `launcher`."""
    with take_port() as taken:
        endpoint = f"localhost:{taken.getsockname()[1]}"
    patience = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
    launcher = ("--nnodes", "1:2", "--nproc_per_node", "1", "--max-restarts", "3", "--rdzv_backend", "c10d")
    launcher += ("--rdzv_id", "1", "--rdzv_endpoint", endpoint, "--rdzv_conf")
    # By itself torchrun looks whether the endpoint is its own host. That host keeps the rendezvous: it may not be lost.
    second, first = (
        start("host", launcher=(*launcher, f"{patience},is_host={is_host}"), log=f"-{is_host}") for is_host in (0, 1)
    )
    wait_until(lambda: "2 ranks on 2 hosts" in first.output + second.output)
    ranks = second.ranks()
    wait_until(lambda: any(first.run_dir.glob("checkpoints/step_*")))
    second.process.kill()
    for rank in ranks.values():
        rank.kill()
    assert first.wait() == 0, first.output
    resumed = first.output.split("Resuming from ")[1].splitlines()[0]
    assert resumed.endswith("written by 2 ranks.")
    assert "1 rank on 1 host" in first.output
    summary = read_summary(first.run_dir)
    assert (summary["world_size"], summary["num_train_samples"]) == (1, STEPS * 8)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_is_told_once(start: Launch, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        job = start("full", "--checkpoint_dir", str(disk / "checkpoints"), "--keep", "1")
        assert job.wait() != 0
        names = [path.name for path in (disk / "checkpoints").iterdir()]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    lines = [line for line in job.output.splitlines() if line.startswith("dlrm: error")]
    assert len(lines) == 1, job.output
    assert f"{disk / 'checkpoints'}" in lines[0]
    assert "can't be written (the disk is full)" in lines[0]
    assert "exitcode  : 2 " in job.output
    assert sorted(names) == [".lock", "step_0000000005"]
