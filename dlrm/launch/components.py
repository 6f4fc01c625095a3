"""torchx component: `torchx run -s SCHEDULER dlrm/launch/components.py:train -j HOSTSxPROCESSES -- FLAGS`."""

import shlex
import sys
from typing import List, Optional  # noqa: UP035 - the types that torchx 0.7 reads from a component

from torchx import specs

from dlrm.config.flags import parse_args
from dlrm.errors import EXIT_USER_ERROR, DlrmError, LaunchError
from dlrm.launch.resources import (
    check_options,
    count_cores,
    estimate_host_gib,
    find_host,
    parse_shape,
    read_env,
    read_mounts,
)

_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
"""Signals that torchrun passes on to the ranks, which save. Unless told to, it would die of the last two."""

_PATIENCE = "last_call_timeout=30,keep_alive_interval=5,keep_alive_max_attempt=6"
"""Half a minute until a host counts as lost, and until a job begins without hosts that have not come."""


def train(
    *flags: str,
    j: str = "1",
    h: Optional[str] = None,  # noqa: UP045
    gpu: int = 0,
    cpu: int = 0,
    memory_gib: int = 0,
    max_restarts: int = 3,
    max_retries: int = 0,
    name: str = "dlrm",
    image: str = "dlrm:latest",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    env: Optional[str] = None,  # noqa: UP045 - torchx shows a traceback where it reads Dict[str, str] in vain
    interface: Optional[str] = None,  # noqa: UP045
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Trains on one host or many. What follows -- are dlrm_main.py's flags, checked before anything is submitted.

    A job that is started again, by torchrun or by the scheduler, continues from its last checkpoint. Without --run_dir
    its run directory is named by the job, and must lie where all hosts see it.

    Args:
        flags: flags of dlrm_main.py
        j: HOSTSxPROCESSES, as in 2x8; HOSTS: a process for each GPU, or one; with MIN:MAXxPROCESSES it continues
            with fewer hosts if the scheduler lets it (Slurm does not)
        h: named resource of torchx for a host, as aws_p4d.24xlarge, in place of gpu, cpu and memory_gib
        gpu: GPUs of a host, each with a process of its own; 0 trains on CPUs
        cpu: cores of a host; by default, 0, 8 for each GPU, or 2 for each process
        memory_gib: memory of a host; by default, 0, what tables (beside GPUs, those beyond 40 GiB each or what
            --device_memory_gib says), checkpoints, rows and processes take, and a fifth
        max_restarts: times that torchrun starts the ranks again when one of them dies
        max_retries: times that the scheduler starts the job again when it has failed
        name: name of the job
        image: image of containers; of no use on Slurm and local schedulers
        mounts: mounts into a container, as type=bind,src=/data,dst=/data,readonly
        env: environment variables, as NCCL_DEBUG=INFO,OMP_NUM_THREADS=4
        interface: network interface between hosts, for NCCL and gloo, as eth0; by default they choose
        rdzv_port: port on the first host at which hosts meet
    """
    flags = flags[1:] if flags[:1] == ("--",) else flags
    try:
        config = parse_args(flags)
        check_options(
            name,
            interface,
            gpu=gpu,
            cpu=cpu,
            memory_gib=memory_gib,
            max_restarts=max_restarts,
            max_retries=max_retries,
            rdzv_port=rdzv_port,
        )
        if h is not None and (gpu or cpu or memory_gib):
            raise LaunchError(f"-h {h} with --gpu, --cpu or --memory_gib: give one of the two")
        host = None if h is None else find_host(h)
        gpus = gpu if host is None else host.gpu
        shape = parse_shape(j, gpus)
        if host is None:
            cpu = cpu or count_cores(shape.processes_per_host, gpus)
            host = specs.Resource(cpu, gpus, 1024 * (memory_gib or estimate_host_gib(config, shape, gpus)))
        mounted = read_mounts(mounts or [])
        asked_env = read_env(env or "")
    except DlrmError as error:  # torchx would show a traceback
        print(f"dlrm: error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    variables = {"OMP_NUM_THREADS": str(max(1, host.cpu // shape.processes_per_host)), "LOGLEVEL": "WARNING"}
    if interface is not None:
        variables |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    run_dir = () if config.output.run_dir is not None else ("--run_dir", f"runs/{specs.macros.app_id}")
    # The shell's variable, not torchx's macro: some schedulers do not set it on the first host itself.
    endpoint = "localhost:0" if shape.hosts == 1 else f"$${{{specs.macros.rank0_env}:=localhost}}:{rdzv_port}"
    launcher = f"torchrun --nnodes {shape.nnodes} --nproc_per_node {shape.processes_per_host} --rdzv_backend c10d "
    launcher += f"--rdzv_endpoint {endpoint} --rdzv_id {specs.macros.app_id} --rdzv_conf {_PATIENCE} "
    launcher += f"--max-restarts {max_restarts} --signals_to_handle {_SIGNALS}"
    # torchx puts its macros in place of ${...}, and Kubernetes variables in place of $(...): neither sees $''.
    flags_as_given = shlex.join(flags).replace("$", "$$''")
    return specs.AppDef(
        name=name,
        roles=[
            specs.Role(
                name="train",
                image=image,
                entrypoint="bash",
                args=["-c", f"exec {launcher} dlrm_main.py {flags_as_given} {shlex.join(run_dir)}".rstrip()],
                env={**variables, **asked_env},
                num_replicas=shape.hosts,
                min_replicas=shape.min_hosts if shape.min_hosts < shape.hosts else None,
                resource=host,
                max_retries=max_retries,
                port_map={"c10d": rdzv_port},
                mounts=mounted,
            )
        ],
    )
