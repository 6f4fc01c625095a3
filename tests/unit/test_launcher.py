"""Which ranks there are, by what srun, mpirun and host names say."""

import os
import threading

import pytest
import torch.distributed as dist

from dlrm.errors import LaunchError
from dlrm.preprocess.ranks import Ranks
from dlrm.ranks.launcher import Seat, adopt_launcher, assign_seats, first_host, note_separate_launchers
from dlrm.ranks.rendezvous import share_texts

MEETING = {"MASTER_ADDR": "first", "MASTER_PORT": "1234"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = {
    **BATCH,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[07-08]",
}
SLURMS_PLACE = {"MASTER_ADDR": "node07", "MASTER_PORT": "15219"}
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": number for name, number in zip(("RANK", "SIZE"), "12", strict=True)}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def adopt(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> dict[str, str]:
    """What the process then knows of ranks, in an environment of these variables."""
    monkeypatch.setattr(os, "environ", dict(environment))
    adopt_launcher()
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def ranks(*values: str) -> dict[str, str]:
    return dict(zip(NAMES, values, strict=False))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        (BATCH, {}),  # the script of a job of four tasks is one process
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, {}),
        (STEP, ranks("3", "4", "1", "2", "node07", "15219")),
        (STEP | {"SLURM_STEP_NUM_NODES": "1"}, ranks("3", "4", "1", "2", "127.0.0.1", "15219")),
        (STEP | MEETING, ranks("3", "4", "1", "2", "first", "1234")),
        (STEP | {"PMI_RANK": "3", "PMI_SIZE": "4"}, {**ranks("3", "4"), **SLURMS_PLACE}),  # srun --mpi=pmi2
        (OPEN_MPI | MEETING, {**ranks("1", "2"), **MEETING}),
        (HYDRA | MEETING, ranks("1", "2", "1", "2", "first", "1234")),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}, {}),
        # Open MPI on Slurm starts its daemons as tasks of a step.
        (STEP | OPEN_MPI | MEETING, {**ranks("1", "2"), **MEETING}),
        # Whoever has set RANK knows better: torchrun under srun, or a launcher of several processes a task.
        (STEP | {"RANK": "5", "WORLD_SIZE": "8"}, ranks("5", "8")),
        (
            STEP | {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x", "SLURM_HET_SIZE": "2"},
            ranks("0", "1"),
        ),
    ],
)
def test_ranks_of_a_launcher(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: dict[str, str]
) -> None:
    assert adopt(monkeypatch, environment) == expected


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (OPEN_MPI, "mpirun has started 2 processes .OMPI_COMM_WORLD_SIZE.*MASTER_ADDR and MASTER_PORT: rank 0's host"),
        ({**HYDRA, "MASTER_ADDR": "first"}, "mpiexec has started 2 processes .PMI_SIZE.*or set MASTER_PORT:"),
        ({**STEP, "SLURM_STEP_NODELIST": ""}, "srun has started 4 processes.*Start with torchrun"),
        ({**STEP, "SLURM_NTASKS": "1"}, "SLURM_STEP_NUM_TASKS=4 and SLURM_NTASKS=1.*Start with torchrun"),
        ({**STEP, "SLURM_HET_SIZE": "2"}, "a job of several components"),
        ({**STEP, "SLURM_PROCID": "x"}, "SLURM_PROCID=x: expected a whole number"),
        ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE=1, but mpirun has started 2 processes"),
    ],
)
def test_processes_that_would_each_train_a_model_of_their_own(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str
) -> None:
    with pytest.raises(LaunchError, match=said):
        adopt(monkeypatch, environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("n[3,5-9],m1", "n3"), ("a,b", "a"), ("r[01-04]n[2-3]", "r01n2"), ("gpu-[001]", "gpu-001")],
)
def test_the_first_of_slurms_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def seat(host: str, local_rank: int | None = None, size: int | None = None, container: str = "") -> Seat:
    return Seat(host, container, local_rank, size)


@pytest.mark.parametrize(
    ("seats", "expected"),
    [
        ([seat("a"), seat("b")], [(0, 1), (0, 1)]),
        ([seat("a"), seat("a"), seat("b"), seat("b"), seat("b")], [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]),
        ([seat("a", container="x"), seat("a", container="y")], [(0, 1), (0, 1)]),  # pods with their host's network
        ([seat("a", 0, 1), seat("a", 0, 1)], [(0, 1), (0, 1)]),  # two launchers on a host
        ([seat("a", 0, 2, "x"), seat("a", 1, 2, "y")], [(0, 2), (1, 2)]),  # a launcher that puts ranks into containers
        ([seat("a", 0), seat("a", 1)], [(0, 2), (1, 2)]),
        ([seat("a", None, 2), seat("a", None, 2)], [(0, 2), (1, 2)]),
    ],
)
def test_which_ranks_share_a_host(seats: list[Seat], expected: list[tuple[int, int]]) -> None:
    assert assign_seats(seats) == expected


@pytest.mark.parametrize(
    "seats",
    [
        [seat("a", 0, 2), seat("b", 1, 2)],  # another host's
        [seat("a", 0, 2), seat("a", 0, 2)],  # the same place twice
        [seat("a", 1, 2), seat("a", 0, 2)],  # another order
        [seat("a", 0, 2), seat("a", 1, 2), seat("a", 0, 2)],  # one is missing
        [seat("a", 0, 2), seat("a", 1, 3), seat("a", 2, 3)],
        [seat("a"), seat("b"), seat("a"), seat("b")],  # not in a row
        [seat("a", 0), seat("a", 0)],  # of two that share a host, each takes its first GPU
    ],
)
def test_places_that_contradict_each_other(seats: list[Seat]) -> None:
    with pytest.raises(LaunchError, match=r"is local rank \d of \d on [ab] .*Start with torchrun") as error:
        assign_seats(seats)
    assert error.value.everywhere


def test_texts_of_all_ranks() -> None:
    store, heard = dist.HashStore(), {}
    threads = [
        threading.Thread(target=lambda r: heard.update({r: share_texts(store, r, 3, f"of {r}")}), args=(r,))
        for r in (2, 1, 0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [heard[rank] for rank in range(3)] == [["of 0", "of 1", "of 2"]] * 3


def test_a_rank_that_fails_while_another_waits_for_it() -> None:
    store = dist.HashStore()
    said: list[str] = []

    def wait() -> None:
        try:
            with Ranks(0, 2, store) as waiting:
                waiting.barrier()
        except LaunchError as error:
            said.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    with pytest.raises(KeyError), Ranks(1, 2, store):
        raise KeyError
    thread.join(20)
    assert said == ["rank 1 has failed; its error says why. Continue with --resume."]


def test_rank_0_which_holds_the_store_leaves_last() -> None:
    store, left = dist.HashStore(), []

    def work(rank: int) -> None:
        with Ranks(rank, 2, store) as own:
            own.barrier()
            if rank == 1:
                assert not released.wait(0.3)
                left.append(1)
        left.append(0) if rank == 0 else None

    released = threading.Event()
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert left == [1, 0]


@pytest.mark.parametrize(("launchers", "tasks", "is_told"), [("1", "4", True), ("2", "2", False), ("1", "", False)])
def test_torchruns_that_know_nothing_of_each_other(launchers, tasks, is_told, monkeypatch) -> None:
    monkeypatch.setenv("GROUP_WORLD_SIZE", launchers)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    note = note_separate_launchers()
    assert (note is not None) is is_told
    assert note is None or note.startswith("WARNING: srun has started 4 tasks (SLURM_STEP_NUM_TASKS)")


@pytest.mark.parametrize("name", ["SLURM_PROCID", "PMIX_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"])
def test_a_task_that_does_not_know_of_the_others_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match=f"{name}=1: this is one of several tasks"):
        adopt(monkeypatch, {"SLURM_NTASKS": "2", name: "1"})
    assert adopt(monkeypatch, {"SLURM_NTASKS": "2", name: "0"}) == {}
    assert adopt(monkeypatch, {name: "1", **ranks("0", "1")}) == ranks("0", "1")
