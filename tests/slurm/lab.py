"""A Slurm of two nodes on this machine, for as long as tests need it.

The daemons are started by hand: no systemd, no cgroups, no accounting, nothing below /etc changed. It needs root, and
Debian's slurmctld, slurmd, slurm-client and munge, which it installs where they are missing.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
NODES = ("node1", "node2")
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# A job of several replicas is a heterogeneous one, which only the backfill scheduler starts.
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2
ReturnToService=2
MailProg=/bin/true
KillWait=30
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=30 State=UP
"""


class Lab:
    """The daemons, and what a user does with them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.conf = root / "slurm.conf"

    def start(self) -> None:
        """Starts munged, slurmctld and a slurmd for each node, and waits until all are idle."""
        for name in ("munge", "state", "spool"):
            (self.root / name).mkdir(parents=True)
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        ports = free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=9999"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        text = _CONF.format(host=socket.gethostname(), port=ports[0], root=self.root, nodes=nodes)
        self.conf.write_text(text)
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # one that is not looked for: none is used
        munge = self.root / "munge"
        self._run(
            "munged",
            *(
                f"--{name}={munge / file}"
                for name, file in (("key-file", "key"), ("socket", "socket"), ("seed-file", "seed"))
            ),
            *(f"--{name}={munge / file}" for name, file in (("pid-file", "pid"), ("log-file", "log"))),
        )
        self._run("slurmctld", "-c", "-f", str(self.conf))
        # torchx gives hosts the first node's name to meet at: inside jobs it must be an address.
        hosts = self.root / "hosts"
        hosts.write_text(Path("/etc/hosts").read_text() + "".join(f"127.0.0.1 {name}\n" for name in NODES))
        for name in NODES:
            (self.root / "spool" / name).mkdir()
            start = f"mount --bind {hosts} /etc/hosts && exec slurmd -c -f {self.conf} -N {name}"
            self._run("unshare", "--mount", "sh", "-c", start)
        wait(lambda: self.run("sinfo", "--noheader", "--states=idle", "--format=%D") == str(len(NODES)), 60)

    def stop(self) -> None:
        """Ends jobs and daemons, by the ids that they wrote."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, check=False)
        time.sleep(0.5)
        pids = [*self.root.glob("slurmd-*.pid"), self.root / "slurmctld.pid", self.root / "munge" / "pid"]
        for pid in [int(path.read_text()) for path in pids if path.exists()]:
            os.kill(pid, signal.SIGTERM)
            wait(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 30)

    @property
    def environment(self) -> dict[str, str]:
        """With which Slurm's commands find this Slurm."""
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def run(self, *command: str) -> str:
        """A command's output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def _run(self, *command: str) -> None:
        subprocess.run(command, env=self.environment, check=True)


def free_ports(number: int) -> list[int]:
    """Ports that nothing listens at now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def install() -> None:
    """Installs what is missing of Slurm."""
    if all(shutil.which(name) for name in ("slurmctld", "slurmd", "sbatch", "munged")):
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *PACKAGES]):
        subprocess.run(["apt-get", *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)


def wait(is_done, seconds: float) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.2)


@contextmanager
def slurm() -> Iterator[Lab]:
    """A Slurm that is up, and afterwards gone."""
    install()
    with tempfile.TemporaryDirectory(prefix="slurm") as name:
        root = Path(name)
        root.chmod(0o755)  # munged wants its socket where anyone can reach it
        lab = Lab(root)
        try:
            lab.start()
            yield lab
        finally:
            lab.stop()
