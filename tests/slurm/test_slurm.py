"""Jobs on a real Slurm, submitted as `torchx run -s slurm` does.

Without accounting torchx itself can't ask for a job's state (it calls sacct): here Slurm's controller is asked.
"""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from torchx.runner import get_runner

from tests.distributed.test_faults import write_days
from tests.docs.commands import blocks_of
from tests.launching import BIN, MAIN, ROOT, TINY, read_losses, read_summary
from tests.slurm.lab import Lab, slurm, wait

COMPONENT = str(ROOT / "dlrm" / "launch" / "components.py:train")
AUROC = re.compile(r"AUROC over (val|test) set: (\d\.\d+)")
FLAGS = [*TINY, "--seed", "1", "--batch_size", "4", "--log_every", "1", "--checkpoint_every", "5"]


class Jobs:
    """Submits, and looks at what comes of it."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self._lab = lab
        self.folder = folder

    def submit(self, component: str, *arguments: str) -> str:
        """A job's id."""
        with get_runner() as runner:
            job = runner.dryrun_component(component, list(arguments), "slurm", {"partition": "test", "time": "10"})
            return runner.schedule(job).rpartition("/")[2]

    def state(self, job: str) -> dict[str, str]:
        """What the controller says of a job; of its first part if it has several."""
        return dict(field.partition("=")[::2] for field in self._lab.run("scontrol", "show", "job", job).split())

    def wait(self, job: str, *, seconds: float = 240) -> dict[str, str]:
        """Waits for a job's end."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait(lambda: self.state(job)["JobState"] in over, seconds)
        return self.state(job)

    def output(self, job: str) -> str:
        """What all parts of a job have said."""
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"slurm-{job}*")))

    def ranks(self, run_dir: Path) -> list[psutil.Process]:
        """Processes that train into this folder."""
        own = []
        for process in psutil.process_iter():
            try:
                command = process.cmdline()
            except psutil.Error:
                continue
            if str(run_dir) in command and "torchrun" not in " ".join(command[:3]):
                own.append(process)
        return own


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if os.geteuid() != 0:
        pytest.skip("only root may start Slurm's daemons by hand")
    with slurm() as lab:
        yield lab


@pytest.fixture
def jobs(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """In a folder of their own, which stands for a checkout."""
    monkeypatch.setenv("SLURM_CONF", str(lab.conf))
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "dlrm_main.py").symlink_to(MAIN)
    monkeypatch.chdir(tmp_path)
    return Jobs(lab, tmp_path)


def check(jobs: Jobs, job: str, ranks: int, hosts: str) -> None:
    state = jobs.wait(job)
    output = jobs.output(job)
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), output
    assert set(dict(AUROC.findall(output))) == {"val", "test"}, output
    summary = read_summary(jobs.folder / "runs" / job)
    assert summary["world_size"] == ranks
    assert 0.3 < summary["test_auroc"] < 0.7  # random data
    assert f"{ranks} ranks on {hosts}, cpu, gloo" in output


@pytest.mark.parametrize(("shape", "hosts"), [("1x2", "1 host"), ("2x1", "2 hosts")])
def test_our_component(jobs: Jobs, shape: str, hosts: str) -> None:
    job = jobs.submit(COMPONENT, "-j", shape, "--memory_gib", "2", "--", *TINY)
    check(jobs, job, 2, hosts)


@pytest.mark.parametrize("shape", ["1x2", "2x1"])
def test_the_line_of_the_public_example(jobs: Jobs, shape: str) -> None:
    job = jobs.submit("dist.ddp", "-j", shape, "--script", "dlrm_main.py", "--", *TINY, "--run_dir", "runs/ddp")
    state = jobs.wait(job)
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), jobs.output(job)
    assert read_summary(jobs.folder / "runs" / "ddp")["world_size"] == 2


def test_the_guides_lines_for_a_cluster_without_accounting(jobs: Jobs) -> None:
    (jobs.folder / "dlrm").symlink_to(ROOT / "dlrm")
    page = "docs/guides/cluster.md"
    (block,) = [block for block in blocks_of(page, (ROOT / page).read_text()) if "sbatch --wait" in block.text]
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    job = done.stdout.split("Submitted batch job ")[1].split()[0]
    assert set(dict(AUROC.findall(jobs.output(job)))) == {"val", "test"}, jobs.output(job)


@pytest.mark.parametrize(
    ("shape", "expected"), [(["-n", "2"], "2 ranks on 1 host"), (["-N", "2", "-n", "2"], "2 ranks on 2 hosts")]
)
def test_srun_by_itself(jobs: Jobs, lab: Lab, shape: list[str], expected: str) -> None:
    output = lab.run("srun", *shape, str(BIN / "python"), MAIN, *TINY, "--run_dir", "run")
    assert f"{expected}, cpu, gloo" in output
    assert output.count("AUROC over test set") == 1
    assert read_summary(jobs.folder / "run")["world_size"] == 2


def test_the_script_of_a_job_of_two_tasks_is_one_process(jobs: Jobs, lab: Lab) -> None:
    Path("job.sh").write_text(f"#!/bin/bash\n{BIN / 'python'} {MAIN} {' '.join(TINY)} --run_dir run\n")
    lab.run("sbatch", "--wait", "-n", "2", "job.sh")
    assert read_summary(jobs.folder / "run")["world_size"] == 1


def test_a_job_that_fails_is_reported_as_failed(jobs: Jobs) -> None:
    job = jobs.submit(
        COMPONENT,
        "-j",
        "1x2",
        "--memory_gib",
        "2",
        "--max_restarts",
        "0",
        "--",
        *TINY,
        *("--in_memory_binary_criteo_path", "gone"),
    )
    state = jobs.wait(job)
    assert state["JobState"] == "FAILED"
    assert state["ExitCode"] == "1:0"
    assert "dlrm: error: gone" in jobs.output(job)


def test_a_killed_job_is_queued_again_and_goes_on(jobs: Jobs) -> None:
    write_days(jobs.folder / "days", (1600, 40))
    flags = [*FLAGS, "--in_memory_binary_criteo_path", "days"]
    resources = ("-j", "1x2", "--memory_gib", "2", "--max_restarts", "0")
    undisturbed = jobs.submit(COMPONENT, *resources, "--", *flags)
    assert jobs.wait(undisturbed)["JobState"] == "COMPLETED", jobs.output(undisturbed)

    job = jobs.submit(COMPONENT, *resources, "--max_retries", "1", "--", *flags)
    run_dir = jobs.folder / "runs" / job
    wait(lambda: any(run_dir.glob("checkpoints/step_*")), 120)
    for rank in jobs.ranks(Path("runs", job)):
        rank.send_signal(signal.SIGKILL)
    wait(lambda: jobs.state(job)["Restarts"] == "1", 60)
    state = jobs.wait(job)
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), jobs.output(job)
    assert f"Resuming from runs/{job}/checkpoints/step_" in jobs.output(job)
    assert read_losses(run_dir) == read_losses(jobs.folder / "runs" / undisturbed)
