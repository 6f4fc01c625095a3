"""Kinds of devices with the numbers of their data sheets, and clusters of one kind.

Every number has its source in docs/design/plan.md, "Hardware". No torch here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, get_args

from annotated_types import Ge, Le, Lt

from dlrm.config.config import MOST_RANKS, Config, Precision, optional
from dlrm.errors import ConfigError
from dlrm.system.console import plural

GIB = 2**30
_GB = 10**9
_TFLOP = 10**12

ASSUMED_EFFICIENCY = 0.7
"""Share of peak numbers that is assumed to be reached if nobody has measured it."""

_MOST_DEVICES = {"cuda": 16, "cpu": 256}
_SHAPE = re.compile(r"(?P<kind>[a-z0-9_]+):(?P<hosts>\d{1,18})x(?P<devices>\d{1,18})", re.ASCII)


@dataclass(frozen=True)
class Hardware:
    """Peak numbers of one kind of host and its devices. On a CPU the ranks of a host share the numbers of the host.

    Attributes:
        device: `cuda`, or `cpu`: there a host is one device that its ranks share.
        memory_bytes: memory of a device; on a CPU the host's.
        memory_bandwidth: bytes/s of a device's memory; on a CPU the host's.
        matrix_rates: operations/s of dense matrix products, by precision; on a CPU the host's.
        intra_host_bandwidth: bytes/s that a rank can send to the other ranks of its host.
        inter_host_bandwidth: bytes/s that all ranks of a host together can send to other hosts.
        host_memory_bytes: memory of a host.
        host_device_bandwidth: bytes/s between a device and its host's memory, one way.
        launch_seconds: least time between two kernels (GPU) or operators (CPU).
        collective_seconds: time of an empty collective, whatever the number of ranks.
        message_seconds: extra time for each message, as a rank sends them one after the other.
        matrix_efficiency: share of the matrix rates that the layers' products reach.
        memory_efficiency: share of the memory bandwidths that lookups and layers reach.
        network_efficiency: share of the bandwidths between ranks that all-to-alls reach.
        ring_share: bandwidth of reduce-scatters and all-gathers, divided by that of all-to-alls.
        reduction_share: bandwidth of all-reduces, divided by that of all-to-alls.
        overlaps: whether products, memory traffic and exchanges hide each other. If not, the same cores do all of
            them, one after the other.
    """

    device: Literal["cuda", "cpu"]
    memory_bytes: float
    memory_bandwidth: float
    matrix_rates: Mapping[Precision, float]
    intra_host_bandwidth: float
    inter_host_bandwidth: float
    host_memory_bytes: float
    host_device_bandwidth: float
    launch_seconds: float
    collective_seconds: float
    message_seconds: float
    matrix_efficiency: float = ASSUMED_EFFICIENCY
    memory_efficiency: float = ASSUMED_EFFICIENCY
    network_efficiency: float = ASSUMED_EFFICIENCY
    ring_share: float = 1.0
    reduction_share: float = 1.0
    overlaps: bool = True


def _gpu(
    memory_gib: int,
    memory_gb_s: float,
    tflops: tuple[float, float, float],
    nvlink_gb_s: float,
    network_gb_s: float,
    host_gib: int,
    pcie_gb_s: float,
) -> Hardware:
    fp32, tf32, bf16 = tflops
    return Hardware(
        "cuda",
        memory_gib * GIB,
        memory_gb_s * _GB,
        {"fp32": fp32 * _TFLOP, "tf32": tf32 * _TFLOP, "bf16": bf16 * _TFLOP},
        nvlink_gb_s * _GB,
        network_gb_s * _GB,
        host_gib * GIB,
        pcie_gb_s * _GB,
        launch_seconds=4e-6,
        collective_seconds=30e-6,
        message_seconds=1e-6,
    )


# A GPU's memory is GiB, though its data sheet says GB. NVLink and PCIe: one way, half of the data sheet's sum. Matrix
# rates: without sparsity. Network and host memory: of the AWS instance with eight of the GPU (the spec has a p4d).
KINDS: Mapping[str, Hardware] = {
    # NVIDIA A100 Tensor Core GPU data sheet (A100 40GB SXM); AWS EC2 P4d: 400 Gbit/s, 1,152 GiB.
    "a100_40gb": _gpu(40, 1555, (19.5, 156, 312), 300, 50, 1152, 32),
    # NVIDIA A100 Tensor Core GPU data sheet (A100 80GB SXM); AWS EC2 P4de: 400 Gbit/s, 1,152 GiB.
    "a100_80gb": _gpu(80, 2039, (19.5, 156, 312), 300, 50, 1152, 32),
    # NVIDIA H100 Tensor Core GPU data sheet (H100 SXM); AWS EC2 P5: 3,200 Gbit/s, 2 TiB.
    "h100": _gpu(80, 3350, (67, 494.5, 989.5), 450, 400, 2048, 64),
    # NVIDIA H200 Tensor Core GPU data sheet (H200 SXM); AWS EC2 P5en: 3,200 Gbit/s, 2 TiB.
    "h200": _gpu(141, 4800, (67, 494.5, 989.5), 450, 400, 2048, 64),
    # NVIDIA HGX B200 data sheet, an eighth of it; AWS EC2 P6-B200: 3,200 Gbit/s, 2 TiB.
    "b200": _gpu(180, 8000, (75, 1125, 2250), 900, 400, 2048, 64),
    # Two Intel Xeon Platinum 8480+ (Intel ARK: 56 cores, 2.0 GHz base, 8 channels of DDR5-4800 each), 512 GiB, 100
    # Gbit/s. Operations of a core per cycle: 64 in fp32 (two AVX-512 FMAs), 1,024 in bf16 (AMX); with VNNI twice as
    # many as fp32 in int16, four times as many in int8.
    "cpu": Hardware(
        "cpu",
        memory_bytes=512 * GIB,
        memory_bandwidth=614.4 * _GB,
        matrix_rates={"fp32": 14.3 * _TFLOP, "bf16": 229.4 * _TFLOP, "int16": 28.7 * _TFLOP, "int8": 57.3 * _TFLOP},
        intra_host_bandwidth=1.43 * _GB,  # benchmarks/results/calibration.json
        inter_host_bandwidth=12.5 * _GB,
        host_memory_bytes=512 * GIB,
        host_device_bandwidth=614.4 * _GB,
        launch_seconds=103e-6,  # from calibration.json, like all that follows except message_seconds
        collective_seconds=274e-6,
        message_seconds=20e-6,
        matrix_efficiency=0.69,
        memory_efficiency=0.18,
        network_efficiency=0.93,
        ring_share=0.44,
        reduction_share=1.02,
        overlaps=False,
    ),
}

_Gib = Annotated[float | None, Ge(1e-3), Lt(1e9), optional("the kind's", "FLOAT")]
_Tflops = Annotated[float | None, Ge(1e-6), Lt(1e9), optional("the kind's", "FLOAT")]
_Micros = Annotated[float | None, Ge(0.0), Lt(1e6), optional("the kind's", "FLOAT")]
_Share = Annotated[float | None, Ge(1e-6), Le(1.0), optional("the kind's", "FLOAT")]


@dataclass(frozen=True)
class HardwareConfig:
    """Numbers that replace the kind's, and the share of peak numbers that is reached. --device_memory_gib,
    --intra_host_bandwidth and --inter_host_bandwidth replace the kind's numbers too."""

    memory_bandwidth: _Gib = None
    """Bandwidth of a device's memory, in GiB/s; on a CPU of the host's."""

    host_memory_gib: _Gib = None
    """Memory of a host, in GiB."""

    host_device_bandwidth: _Gib = None
    """Bandwidth between a GPU and its host's memory, one way, in GiB/s."""

    fp32_tflops: _Tflops = None
    """Rate of a device's matrix products in fp32, in 10^12 operations/s; on a CPU of the host's."""

    tf32_tflops: _Tflops = None
    """The same in tf32."""

    bf16_tflops: _Tflops = None
    """The same in bf16."""

    int16_tflops: _Tflops = None
    """The same in int16, in which only CPUs train."""

    int8_tflops: _Tflops = None
    """The same in int8, in which only CPUs train."""

    launch_us: _Micros = None
    """Least time between two kernels, in microseconds."""

    collective_latency_us: _Micros = None
    """Time of an empty collective, in microseconds, whatever the number of ranks."""

    message_us: _Micros = None
    """Extra time of a collective for each message that a rank sends, in microseconds."""

    matrix_efficiency: _Share = None
    """Share of the peak rate that the layers' matrix products reach."""

    memory_efficiency: _Share = None
    """Share of the peak memory bandwidth that lookups and layers reach."""

    network_efficiency: _Share = None
    """Share of the peak bandwidths between ranks that collectives reach."""


@dataclass(frozen=True)
class ClusterShape:
    """Hosts of one kind, as --cluster names them."""

    kind: str
    hosts: int
    devices_per_host: int

    @property
    def world_size(self) -> int:
        """Number of all ranks."""
        return self.hosts * self.devices_per_host

    def __str__(self) -> str:
        """The form that --cluster takes."""
        return f"{self.kind}:{self.hosts}x{self.devices_per_host}"

    def describe(self) -> str:
        """The cluster in words."""
        hosts = f"{plural(self.hosts, 'host')} of {plural(self.devices_per_host, 'device')}"
        return f"{self}, {hosts}, {plural(self.world_size, 'rank')}"


def parse_cluster(text: str) -> ClusterShape:
    """Reads the value of --cluster.

    Raises:
        ConfigError: if it is not KIND:HOSTSxDEVICES, or there can be no such cluster.
    """
    expected = "expected KIND:HOSTSxDEVICES, as in a100_40gb:2x8 for 2 hosts of 8 GPUs each"
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise ConfigError(f"--cluster {text[:60]!r}: {expected}. Kinds: {', '.join(KINDS)}.")
    kind, hosts, devices = found["kind"], int(found["hosts"]), int(found["devices"])
    if kind not in KINDS:
        raise ConfigError(f"--cluster {text}: no kind {kind}, expected one of {', '.join(KINDS)}. Others by flags.")
    if hosts == 0 or devices == 0:
        raise ConfigError(f"--cluster {text}: {hosts} hosts of {devices} devices, {expected}.")
    most = _MOST_DEVICES[KINDS[kind].device]
    if devices > most:
        swapped = f" Hosts come first: {kind}:{devices}x{hosts}?" if hosts <= most else ""
        raise ConfigError(f"--cluster {text}: {devices} devices a host, expected {most} or fewer.{swapped}")
    if hosts * devices > MOST_RANKS:
        raise ConfigError(f"--cluster {text}: {hosts * devices:,} ranks, expected {MOST_RANKS:,} or fewer.")
    return ClusterShape(kind, hosts, devices)


def hardware_of(
    shape: ClusterShape, config: HardwareConfig, device_gib: float | None, intra: float | None, inter: float | None
) -> Hardware:
    """What a rank of the cluster has: the kind's numbers, unless flags replace them. On a CPU, its share of the host's.

    Args:
        device_gib: memory of a GPU, or on a CPU of a rank, in GiB; None for the kind's.
        intra: bandwidth between ranks of a host in GiB/s; None for the kind's.
        inter: bandwidth between hosts in GiB/s; None for the kind's.
    """
    kind = KINDS[shape.kind]
    is_shared = kind.device == "cpu"
    share = 1 / shape.devices_per_host if is_shared else 1.0
    of_ranks = device_gib * shape.devices_per_host if is_shared and device_gib is not None else config.host_memory_gib
    host_memory = _in(GIB, of_ranks, kind.host_memory_bytes)
    memory = host_memory / shape.devices_per_host if is_shared else kind.memory_bytes
    rates = {
        precision: _in(_TFLOP, getattr(config, f"{precision}_tflops"), rate) * share
        for precision, rate in kind.matrix_rates.items()
    }
    return replace(
        kind,
        memory_bytes=_in(GIB, device_gib, memory),
        memory_bandwidth=_in(GIB, config.memory_bandwidth, kind.memory_bandwidth) * share,
        matrix_rates=rates,
        intra_host_bandwidth=_in(GIB, intra, kind.intra_host_bandwidth),
        inter_host_bandwidth=_in(GIB, inter, kind.inter_host_bandwidth),
        host_memory_bytes=host_memory,
        host_device_bandwidth=_in(GIB, config.host_device_bandwidth, kind.host_device_bandwidth),
        launch_seconds=_in(1e-6, config.launch_us, kind.launch_seconds),
        collective_seconds=_in(1e-6, config.collective_latency_us, kind.collective_seconds),
        message_seconds=_in(1e-6, config.message_us, kind.message_seconds),
        matrix_efficiency=_in(1, config.matrix_efficiency, kind.matrix_efficiency),
        memory_efficiency=_in(1, config.memory_efficiency, kind.memory_efficiency),
        network_efficiency=_in(1, config.network_efficiency, kind.network_efficiency),
    )


def precision_on(config: Config, hardware: Hardware, shape: ClusterShape) -> Precision:
    """Arithmetic of matrix products: the one that was asked for, but fp32 instead of tf32 on a CPU.

    Raises:
        ConfigError: if the hardware does not have it.
    """
    asked = config.training.arithmetic
    if asked == "tf32" and hardware.device == "cpu":
        return "fp32"
    if asked not in hardware.matrix_rates:
        known = ", ".join(hardware.matrix_rates)
        raise ConfigError(f"--precision {asked} with --cluster {shape}: expected one of {known} there.")
    return asked


def check_effects(config: HardwareConfig, run: Config, shape: ClusterShape) -> None:
    """Refuses numbers that nothing would be computed from.

    Raises:
        ConfigError: naming the flag; or if the hardware does not have the run's arithmetic.
    """
    kind = KINDS[shape.kind]
    used = precision_on(run, kind, shape)
    products = f"matrix products are in {used} there. Leave it out, or give another --precision."
    idle = {f"{precision}_tflops": products for precision in get_args(Precision) if precision != used}
    if kind.device == "cpu":
        idle["host_device_bandwidth"] = "tables are in the memory of the CPU itself. Give --memory_bandwidth."
        if run.sharding.device_memory_gib is not None:
            idle["host_memory_gib"] = "--device_memory_gib says already what each rank has. Give one of the two."
    for name, why in idle.items():
        if (value := getattr(config, name)) is not None:
            raise ConfigError(f"--{name} {value:g} with --cluster {shape}: {why}")


def _in(unit: float, given: float | None, otherwise: float) -> float:
    return otherwise if given is None else given * unit
