"""Kinds of devices with the numbers of their data sheets, and a cluster of one kind.

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
"""Share of peak numbers that is taken to be reached where nobody has measured it."""

_MOST_DEVICES = {"cuda": 16, "cpu": 256}
_SHAPE = re.compile(r"(?P<kind>[a-z0-9_]+):(?P<hosts>\d{1,18})x(?P<devices>\d{1,18})", re.ASCII)


@dataclass(frozen=True)
class Hardware:
    """Peak numbers of one kind of host and its devices. On a CPU the ranks of a host share all that is the host's.

    Attributes:
        device: `cuda`, or `cpu`, where a host is one device that its ranks share.
        memory_bytes: of a device; on a CPU the host's.
        memory_bandwidth: bytes/s of a device; on a CPU the host's.
        matrix_rates: floating point operations/s of dense matrix products, by precision; on a CPU the host's.
        intra_host_bandwidth: bytes/s that a rank can send to others of its host.
        inter_host_bandwidth: bytes/s that a host can send to others, all its ranks together.
        host_memory_bytes: of a host.
        host_device_bandwidth: bytes/s between a device and its host's memory, one way.
        launch_seconds: least time between two kernels (GPU) or operators (CPU).
        collective_seconds: time of a collective of no bytes, however many ranks it has.
        message_seconds: what it takes more for each message that a rank sends after another.
        matrix_efficiency: share of the matrix rates that the layers' products reach.
        memory_efficiency: share of the bandwidths of memory that lookups and layers reach.
        network_efficiency: share of the bandwidths between ranks that all-to-alls reach.
        ring_share: bandwidth of reduce-scatters and all-gathers, over that of all-to-alls.
        reduction_share: bandwidth of all-reduces, over the same.
        overlaps: products, memory traffic and exchanges hide behind each other. If not, the same cores do all of
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


# GB as data sheets of GPU memory have it is GiB. NVLink and PCIe: one way, half of what the data sheet adds up. Matrix
# rates: without sparsity. Network and host memory: the AWS instance with eight of the GPU (p4d's is the spec's setup).
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
    # Gbit/s. A core's cycle: 64 fp32 operations (two AVX-512 FMAs), 1,024 bf16 (AMX); through VNNI
    # twice fp32's in int16, four times in int8.
    "cpu": Hardware(
        "cpu",
        memory_bytes=512 * GIB,
        memory_bandwidth=614.4 * _GB,
        matrix_rates={"fp32": 14.3 * _TFLOP, "bf16": 229.4 * _TFLOP, "int16": 28.7 * _TFLOP, "int8": 57.3 * _TFLOP},
        intra_host_bandwidth=1.43 * _GB,  # benchmarks/results/calibration.json
        inter_host_bandwidth=12.5 * _GB,
        host_memory_bytes=512 * GIB,
        host_device_bandwidth=614.4 * _GB,
        launch_seconds=103e-6,  # this and what follows, but for messages: calibration.json
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
    """Numbers that replace the kind's, and what share of peak numbers is reached. --device_memory_gib,
    --intra_host_bandwidth and --inter_host_bandwidth do so too."""

    memory_bandwidth: _Gib = None
    """Of a device's memory, in GiB/s; of a CPU, of the host's."""

    host_memory_gib: _Gib = None
    """Memory of a host, in GiB."""

    host_device_bandwidth: _Gib = None
    """Between a GPU and its host's memory, one way, in GiB/s."""

    fp32_tflops: _Tflops = None
    """Matrix products of a device in fp32, in 10^12 operations/s; of a CPU, of the host."""

    tf32_tflops: _Tflops = None
    """The same in tf32."""

    bf16_tflops: _Tflops = None
    """The same in bf16."""

    int16_tflops: _Tflops = None
    """The same in int16, with which only CPUs train."""

    int8_tflops: _Tflops = None
    """The same in int8, with which only CPUs train."""

    launch_us: _Micros = None
    """Least time between two kernels, in microseconds."""

    collective_latency_us: _Micros = None
    """Time of a collective of no bytes, in microseconds, however many ranks it has."""

    message_us: _Micros = None
    """Time that it takes more for each message that a rank sends after another, in microseconds."""

    matrix_efficiency: _Share = None
    """Share of the peak rate that the layers' matrix products reach."""

    memory_efficiency: _Share = None
    """Share of the peak memory bandwidth that lookups and layers reach."""

    network_efficiency: _Share = None
    """Share of the peak bandwidths between ranks that collectives reach."""


@dataclass(frozen=True)
class ClusterShape:
    """Hosts of one kind: what --cluster says."""

    kind: str
    hosts: int
    devices_per_host: int

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.hosts * self.devices_per_host

    def __str__(self) -> str:
        """As --cluster takes it."""
        return f"{self.kind}:{self.hosts}x{self.devices_per_host}"

    def describe(self) -> str:
        """In words."""
        hosts = f"{plural(self.hosts, 'host')} of {plural(self.devices_per_host, 'device')}"
        return f"{self}, {hosts}, {plural(self.world_size, 'rank')}"


def parse_cluster(text: str) -> ClusterShape:
    """What --cluster says.

    Raises:
        ConfigError: if it is no KIND:HOSTSxDEVICES, or no such cluster can be.
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
    """What a rank of the cluster has: the kind's numbers, or those of flags, of a CPU its share of the host's.

    Args:
        device_gib: memory of a GPU, or on a CPU of a rank; None for the kind's.
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
    """Arithmetic of matrix products: as asked, but for tf32 on a CPU, which is fp32 there.

    Raises:
        ConfigError: if the hardware has none such.
    """
    asked = config.training.arithmetic
    if asked == "tf32" and hardware.device == "cpu":
        return "fp32"
    if asked not in hardware.matrix_rates:
        known = ", ".join(hardware.matrix_rates)
        raise ConfigError(f"--precision {asked} with --cluster {shape}: expected one of {known} there.")
    return asked


def check_effects(config: HardwareConfig, run: Config, shape: ClusterShape) -> None:
    """Refuses numbers that nothing would be reckoned with.

    Raises:
        ConfigError: naming the flag; or if the hardware has no such arithmetic as the run's.
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
