"""What the torchx component asks of a scheduler, up to the request that would be sent."""

import dataclasses
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from torchx import specs
from torchx.runner import get_runner
from torchx.specs import AppDef

from dlrm.config.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimizerConfig, ShardingConfig
from dlrm.config.flags import parse_args
from dlrm.config.interval import Interval
from dlrm.config.recipes import RANKS, RECIPES
from dlrm.errors import LaunchError
from dlrm.launch.components import train
from dlrm.launch.resources import Shape, estimate_host_gib, parse_shape
from tests.docs.commands import blocks_of
from tests.launching import ROOT

COMPONENT = str(ROOT / "dlrm" / "launch" / "components.py:train")


@pytest.mark.parametrize(
    ("text", "gpus", "shape"),
    [
        ("1", 0, Shape(1, 1, 1)),
        ("3", 0, Shape(3, 3, 1)),
        ("2x4", 0, Shape(2, 2, 4)),
        ("2", 8, Shape(2, 2, 8)),
        ("2x8", 8, Shape(2, 2, 8)),
        ("1:4x2", 0, Shape(1, 4, 2)),
    ],
)
def test_shapes(text, gpus, shape):
    assert parse_shape(text, gpus) == shape
    assert shape.nnodes == ("1:4" if text.startswith("1:") else str(shape.hosts))


@pytest.mark.parametrize(
    ("text", "gpus", "words"),
    [
        ("2x", 0, "-j 2x: expected HOSTSxPROCESSES"),
        ("0x2", 0, "-j 0x2: expected"),
        ("two", 0, "-j two: expected"),
        ("99999999x8", 0, "-j 99999999x8: 799,999,992 processes, expected 4,096 or fewer"),
        ("1x" + "9" * 5000, 0, "-j 1x9{58}: expected HOSTSxPROCESSES"),
        ("4:2x1", 0, "at least 4 hosts, at most 2. Swap them"),
        ("2x4", 8, "-j 2x4 with 8 GPUs a host: expected a process for each GPU, -j 2x8"),
    ],
)
def test_shapes_that_make_no_sense(text, gpus, words):
    with pytest.raises(LaunchError, match=words):
        parse_shape(text, gpus)


def role_of(app: AppDef) -> specs.Role:
    (role,) = app.roles
    return role


def test_one_host():
    app = train("--batch_size", "64", j="1x2")
    role = role_of(app)
    assert (app.name, role.entrypoint, role.num_replicas, role.min_replicas) == ("dlrm", "bash", 1, None)
    assert (role.resource.cpu, role.resource.gpu) == (4, 0)
    assert role.env["OMP_NUM_THREADS"] == "2"
    command = shlex.split(role.args[1])
    assert command[:2] == ["exec", "torchrun"]
    assert command[command.index("--rdzv_endpoint") + 1] == "localhost:0"
    assert command[command.index("dlrm_main.py") :] == [
        *("dlrm_main.py", "--batch_size", "64", "--run_dir", f"runs/{specs.macros.app_id}")
    ]


def test_many_hosts_with_gpus():
    mounts = ["type=bind", "src=/data", "dst=/data", "readonly"]
    app = train(
        "--run_dir", "/data/a run", j="2", gpu=8, interface="eth0", mounts=mounts, max_retries=2, env="A=b,C=d,e"
    )
    role = role_of(app)
    assert (role.num_replicas, role.max_retries) == (2, 2)
    assert (role.resource.cpu, role.resource.gpu) == (64, 8)
    assert {
        "NCCL_SOCKET_IFNAME": "eth0",
        "GLOO_SOCKET_IFNAME": "eth0",
        "A": "b",
        "C": "d,e",
    }.items() <= role.env.items()
    assert [(mount.src_path, mount.read_only) for mount in role.mounts] == [("/data", True)]
    command = role.args[1]
    assert "--nnodes 2 --nproc_per_node 8 " in command
    assert f"--rdzv_endpoint $${{{specs.macros.rank0_env}:=localhost}}:29500" in command
    assert command.endswith("dlrm_main.py --run_dir '/data/a run'")


def test_a_job_that_may_lose_hosts():
    role = role_of(train(j="1:3x2"))
    assert (role.min_replicas, role.num_replicas) == (1, 3)
    assert "--nnodes 1:3 " in role.args[1]


def test_a_named_resource():
    role = role_of(train(j="2", h="aws_p4d.24xlarge"))
    assert (role.resource.gpu, role.resource.cpu) == (8, 96)
    assert "--nproc_per_node 8 " in role.args[1]
    assert role.env["OMP_NUM_THREADS"] == "12"


@pytest.mark.parametrize(
    ("flags", "options", "words"),
    [
        (["--batch_size", "0"], {}, "--batch_size 0: expected more than 0"),
        (["--batch_sise", "3"], {}, "did you mean --batch_size"),
        ([], {"j": "x"}, "-j x: expected"),
        ([], {"h": "aws_p4d.24xlarge", "gpu": 4}, "-h aws_p4d.24xlarge with --gpu, --cpu or --memory_gib"),
        ([], {"h": "nosuch"}, "-h nosuch: no named resource of torchx"),
        ([], {"h": ""}, "-h : no named resource of torchx"),
        ([], {"h": "NULL"}, "-h NULL: no named resource of torchx"),
        ([], {"j": "99999999"}, "-j 99999999: 99,999,999 processes"),
        ([], {"gpu": -1}, "--gpu -1: expected 0 to 64"),
        ([], {"cpu": -2}, "--cpu -2: expected 0 to 4096"),
        ([], {"cpu": 10**9}, "--cpu 1000000000: expected 0 to 4096"),
        ([], {"memory_gib": -1}, "--memory_gib -1: expected 0 to 65536"),
        ([], {"max_restarts": -1}, "--max_restarts -1: expected 0 to 1000"),
        ([], {"max_retries": -1}, "--max_retries -1: expected 0 to 1000"),
        ([], {"rdzv_port": 0}, "--rdzv_port 0: expected 1 to 65535"),
        ([], {"rdzv_port": 65536}, "--rdzv_port 65536: expected 1 to 65535"),
        ([], {"name": "a b; touch x"}, "--name 'a b; touch x': expected 1 to 40 letters"),
        ([], {"name": ""}, "--name '': expected 1 to 40 letters"),
        ([], {"interface": ""}, "--interface '': expected the name of one network interface"),
        ([], {"interface": "eth0,eth1"}, "--interface 'eth0,eth1': expected the name of one"),
        ([], {"interface": "eth0 "}, "--interface 'eth0 ': expected the name of one"),
        ([], {"mounts": ["src=/data"]}, "--mounts src=/data: type must be specified first. Expected type=bind"),
        ([], {"mounts": ["type=bind", "src=/data"]}, "--mounts type=bind,src=/data: no dst. Expected type=bind"),
        ([], {"mounts": ["type=tape"]}, "--mounts type=tape: invalid mount type"),
        ([], {"mounts": ["/data:/data"]}, "--mounts /data:/data: unknown mount option"),
        ([], {"env": "NCCL_DEBUG"}, "--env NCCL_DEBUG: expected NAME=VALUE,NAME=VALUE"),
        ([], {"env": "A B=c"}, "--env A B=c: expected NAME=VALUE,NAME=VALUE"),
        (["--in_memory_binary_criteo_path", "/not/here"], {}, "/not/here: its rows can't be seen from here"),
        (["--in_memory_binary_criteo_path", "dlrm"], {}, "not known. Give --memory_gib, or --mmap_mode after the --."),
    ],
)
def test_mistakes_are_one_line_before_anything_is_submitted(flags, options, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(*flags, **options)
    error = capsys.readouterr().err
    assert error.startswith("dlrm: error: ")
    assert words in error
    assert error.count("\n") == 1


GIB_OF_TABLES = 26 * 2**20 * 64 * 4 / 2**30


@pytest.mark.parametrize(
    ("optimizer", "mode", "gpus", "copies"),
    [
        ("sgd", "sync", 0, 1.0),
        ("sgd", "async", 0, 2.0),
        ("adagrad", "async", 0, 4.0),
        ("adagrad", "async", 1, 2.0),
        ("rowwise_adagrad", "sync", 1, 0.0),
        ("adam", "sync", 0, 3.0),
    ],
)
def test_memory_is_that_of_tables_and_copies(optimizer, mode, gpus, copies):
    config = Config(
        model=ModelConfig(num_embeddings=2**20, embedding_dim=64),
        optimizer=OptimizerConfig(optimizer=optimizer),
        checkpoint=CheckpointConfig(checkpoint_every=Interval("5"), checkpoint_mode=mode),
    )
    estimates = [estimate_host_gib(config, Shape(hosts, hosts, 1), gpus) for hosts in (1, 4)]
    processes = 6.0 if gpus else 1.5
    expected = [1.2 * (copies * GIB_OF_TABLES / hosts + processes) for hosts in (1, 4)]
    assert estimates == pytest.approx(expected, abs=1.0)
    assert all(estimate >= wanted for estimate, wanted in zip(estimates, expected, strict=True))


def test_memory_of_tables_that_gpus_can_not_hold():
    config = Config(
        model=ModelConfig(num_embeddings=2**24, embedding_dim=64),
        checkpoint=CheckpointConfig(checkpoint_every=Interval("never")),
    )
    tables = 26 * 2**24 * 64 * 4 / 2**30
    large = dataclasses.replace(config, sharding=ShardingConfig(device_memory_gib=80.0))
    assert estimate_host_gib(config, Shape(1, 1, 1), 1) == pytest.approx(1.2 * (tables - 34 + 6), abs=1)
    assert estimate_host_gib(large, Shape(1, 1, 1), 1) == pytest.approx(1.2 * (tables - 68 + 6), abs=1)
    assert estimate_host_gib(config, Shape(1, 1, 8), 8) == pytest.approx(1.2 * 48, abs=1)
    assert estimate_host_gib(config, Shape(2, 2, 1), 1) == pytest.approx(1.2 * ((tables - 68) / 2 + 6), abs=1)


def test_memory_of_rows(tmp_path):
    for name in ("day_0_dense.npy", "day_0_sparse.npy"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(5 * 2**30)
    data = DataConfig(in_memory_binary_criteo_path=str(tmp_path))
    mapped = DataConfig(in_memory_binary_criteo_path=str(tmp_path), mmap_mode=True)
    shape, checkpoint = Shape(2, 2, 1), CheckpointConfig(checkpoint_every=Interval("never"))
    in_memory, on_disk = (
        estimate_host_gib(Config(data=one, checkpoint=checkpoint), shape, 0) for one in (data, mapped)
    )
    assert in_memory - on_disk == pytest.approx(1.2 * 5, abs=1)


def request(scheduler: str, *arguments: str, **options: object) -> str:
    """What would be sent to the scheduler."""
    with get_runner() as runner:
        return str(runner.dryrun_component(COMPONENT, list(arguments), scheduler, options))


def test_a_job_for_slurm():
    script = request("slurm", "-j", "2x2", "--memory_gib", "3", "--max_retries", "2", "--", "--batch_size", "64")
    assert script.count("#SBATCH --job-name=train-") == 2
    assert script.count("--requeue --ntasks-per-node=1 --cpus-per-task=4 --mem=3072") == 2
    assert "TORCHX_MAX_RETRIES=2" in script
    assert "--rdzv_endpoint ${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:29500" in script
    assert "runs/'\"$SLURM_JOB_ID\"''" in script


ODD = "/data/$HOME ${app_id} $$ $(A) it's"
"""torchx has macros in ${...} and takes one of two dollars away; Kubernetes puts variables in place of $(...)."""


def given_to_torchrun(command: list[str], folder: Path) -> list[str]:
    """The arguments that reach torchrun, and by way of it dlrm_main.py, when a job's command runs."""
    for name, text in (
        ("torchrun", 'printf "%s\\n" "$@"'),
        ("srun", 'while [ $1 != bash ]; do shift; done; exec "$@"'),
    ):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "HOME": "/home", "A": "b"}
    return subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout.splitlines()


def test_dollars_in_flags_reach_training_on_this_machine(tmp_path):
    with get_runner() as runner:
        job = runner.dryrun_component(COMPONENT, ["--", "--run_dir", ODD], "local_cwd").request
    assert given_to_torchrun(job.role_params["train"][0].args, tmp_path)[-3:] == ["dlrm_main.py", "--run_dir", ODD]


def test_dollars_in_flags_reach_training_on_slurm(tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(request("slurm", "-j", "2x1", "--", "--checkpoint_dir", ODD).split("#----------------\n")[-1])
    given = given_to_torchrun(["bash", str(script)], tmp_path)
    start = given.index("dlrm_main.py")
    assert given[start : start + 5] == ["dlrm_main.py", "--checkpoint_dir", ODD, "--run_dir", "runs/7"]


@pytest.mark.parametrize(("scheduler", "options"), [("slurm", {}), ("kubernetes", {"queue": "default"})])
@pytest.mark.filterwarnings("ignore:\\nRole train configured with restarts")
def test_the_guides_lines_need_no_look_at_the_data(scheduler, options, monkeypatch):
    pytest.importorskip("kubernetes")
    monkeypatch.setattr(Path, "iterdir", lambda path: (_ for _ in ()).throw(FileNotFoundError(path)))
    blocks = blocks_of("cluster.md", (ROOT / "docs/guides/cluster.md").read_text())
    (line,) = (
        line
        for block in blocks
        for line in block.text.replace("\\\n", "").splitlines()
        if f"-s {scheduler} " in line and "/data" in line
    )
    words = shlex.split(line)
    asked = words[words.index("dlrm/launch/components.py:train") + 1 :]
    folded = request(scheduler, *asked, **options)  # YAML breaks long lines at spaces
    assert "--in_memory_binary_criteo_path /data/days" in " ".join(folded.split())


@pytest.mark.parametrize(("page", "count"), [("README.md", 1), ("docs/guides/cluster.md", 3)])
def test_the_guides_lines_keep_the_recipes_global_batch(page, count):
    lines = [
        line
        for block in blocks_of(page, (ROOT / page).read_text())
        for line in block.text.replace("\\\n", "").splitlines()
        if "components.py:train" in line and "--recipe mlperf_v1" in line
    ]
    assert len(lines) == count
    recipe = RECIPES["mlperf_v1"]().data.batch_size * RANKS["mlperf_v1"]
    for line in lines:
        words = shlex.split(line)
        options, flags = words[: words.index("--")], words[words.index("--") + 1 :]
        gpus = 8 if "aws_p4d.24xlarge" in options else 0
        shape = parse_shape(options[options.index("-j") + 1], gpus)
        assert parse_args(flags).data.batch_size * shape.hosts * shape.processes_per_host == recipe, line


# 2026-11-23: torchx 0.7 warns that Volcano 1.4 restarts jobs in its own way (volcano-sh/volcano#1651).
@pytest.mark.filterwarnings("ignore:\\nRole train configured with restarts")
def test_a_job_for_kubernetes():
    yaml = pytest.importorskip("yaml")
    pytest.importorskip("kubernetes")
    asked = ["-j", "2", "--gpu", "8", "--cpu", "64", "--memory_gib", "100", "--max_retries", "3", "--name", "v1"]
    asked += ["--image", "registry/dlrm:1", "--mounts", "type=bind,src=/data,dst=/data,readonly", "--env", "A=b"]
    job = yaml.safe_load(request("kubernetes", *asked, "--", "--recipe", "mlperf_v1", queue="default"))
    assert (job["kind"], job["spec"]["schedulerName"], job["spec"]["queue"]) == ("Job", "volcano", "default")
    assert job["metadata"]["name"].startswith("v1-")
    assert [task["replicas"] for task in job["spec"]["tasks"]] == [1, 1]
    for task in job["spec"]["tasks"]:
        assert task["maxRetry"] == 3
        (container,) = task["template"]["spec"]["containers"]
        assert container["image"] == "registry/dlrm:1"
        limits = container["resources"]["limits"]
        assert (limits["nvidia.com/gpu"], limits["cpu"]) == ("8", "64000m")
        assert container["resources"]["limits"]["memory"] == f"{100 * 1024}M"
        assert {"name": "A", "value": "b"} in container["env"]
        assert {"name": "OMP_NUM_THREADS", "value": "8"} in container["env"]
        assert {"name": "mount-0", "mountPath": "/data", "readOnly": True}.items() <= container["volumeMounts"][
            1
        ].items()
        command = container["command"][2]
        assert "--nnodes 2 --nproc_per_node 8" in command
        assert f"--recipe mlperf_v1 --run_dir runs/{job['metadata']['name']}" in command.replace("'", "")
    endpoints = [task["template"]["spec"]["containers"][0]["command"][2] for task in job["spec"]["tasks"]]
    assert "${TORCHX_RANK0_HOST:=localhost}:29500" in endpoints[0]
    assert "${VC_TRAIN_0_HOSTS:=localhost}:29500" in endpoints[1]
    json.dumps(job)


def test_dollars_in_flags_reach_training_on_kubernetes(tmp_path):
    yaml = pytest.importorskip("yaml")
    pytest.importorskip("kubernetes")
    job = yaml.safe_load(request("kubernetes", "--", "--run_dir", ODD, queue="default"))
    command = job["spec"]["tasks"][0]["template"]["spec"]["containers"][0]["command"]
    assert "$(" not in command[2]
    assert given_to_torchrun(command, tmp_path)[-2:] == ["--run_dir", ODD]
