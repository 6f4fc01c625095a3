"""Cores and threads of the ranks of a host."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from dlrm.ranks import runtime
from dlrm.system.host import Core, allowed_cores, give_way, share_of_rank

SHOW_THREADS = "import os; from dlrm.system.host import chosen_threads; print(chosen_threads())"


def write_system(folder: Path, cpus_of_node: list[str], core_of_cpu: dict[int, int]) -> Path:
    for node, cpus in enumerate(cpus_of_node):
        (folder / f"node/node{node}").mkdir(parents=True)
        (folder / f"node/node{node}/cpulist").write_text(f"{cpus}\n")
    for cpu, core in core_of_cpu.items():
        topology = folder / f"cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{core // 2}\n")
        (topology / "core_id").write_text(f"{core % 2}\n")
    return folder


def test_neighbours_in_core_and_in_memory_lie_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = write_system(tmp_path, ["0-1,4-5", "2-3,6-7"], {cpu: cpu % 4 for cpu in range(8)})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    cores = allowed_cores(system)
    assert [core.cpu for core in cores] == [0, 4, 1, 5, 2, 6, 3, 7]
    shares = [share_of_rank(cores, rank, 2) for rank in range(2)]
    assert [{core.node for core in share} for share in shares] == [{0}, {1}]
    assert [len({core.physical for core in share}) for share in shares] == [2, 2]


def test_a_system_that_says_nothing_of_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert allowed_cores(tmp_path) == [Core(0, 3, 3, 3), Core(0, 5, 5, 5)]


@pytest.mark.parametrize(("num_cores", "ranks"), [(7, 3), (8, 2), (5, 5), (64, 8)])
def test_each_core_is_in_one_share(num_cores: int, ranks: int) -> None:
    cores = [Core(0, 0, cpu, cpu) for cpu in range(num_cores)]
    shares = [share_of_rank(cores, rank, ranks) for rank in range(ranks)]
    assert [core for share in shares for core in share] == cores
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_ranks_than_cores_share_all_of_them() -> None:
    cores = [Core(0, 0, 0, 0)]
    assert share_of_rank(cores, 1, 2) == cores


@pytest.mark.parametrize(
    ("environment", "bound_to", "said"),
    [
        ({}, {2, 3, 6, 7}, "2 threads a rank on 8 cores, each rank on its share of 2 NUMA nodes"),
        (
            {"OMP_NUM_THREADS": "3"},
            {2, 3, 6, 7},
            "3 threads a rank (OMP_NUM_THREADS) on 8 cores, each rank on its share of 2 NUMA nodes",
        ),
    ],
)
def test_what_a_rank_of_a_host_with_two_numa_nodes_says_of_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], bound_to: set[int], said: str
) -> None:
    system = write_system(tmp_path, ["0-1,4-5", "2-3,6-7"], {cpu: cpu % 4 for cpu in range(8)})
    bound: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: bound.append(cpus))
    monkeypatch.setattr(runtime, "allowed_cores", lambda: allowed_cores(system))
    monkeypatch.setattr(runtime, "is_bound_already", lambda: False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    try:
        assert runtime._arrange_threads(1, 2) == said
        assert runtime._arrange_threads(0, 1) == said.split(",")[0].replace("2 threads", "4 threads")
    finally:
        torch.set_num_threads(before)
    assert bound == [bound_to]


def run_under(launcher: dict[str, str], worker: dict[str, str]) -> str:
    """What a worker thinks was chosen, whose launcher has one environment and gives it another."""
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SHOW_THREADS!r}], env={worker!r})"
    done = subprocess.run([sys.executable, "-c", start], env=launcher, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_threads_that_torchrun_chose_are_not_the_users() -> None:
    bare = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    elastic = {"TORCHELASTIC_RUN_ID": "x"}
    assert run_under(bare, bare) == "None"
    assert run_under(bare, bare | {"OMP_NUM_THREADS": "3"}) == "3"
    assert run_under(bare, bare | elastic | {"OMP_NUM_THREADS": "1"}) == "None"
    assert run_under(bare | {"OMP_NUM_THREADS": "1"}, bare | elastic | {"OMP_NUM_THREADS": "1"}) == "1"


def test_a_thread_that_gives_way_leaves_others_as_they_are() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    seen = []

    def run() -> None:
        for _ in range(3):
            give_way()
            seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [min(19, before + 10), min(19, before + 20), 19]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
