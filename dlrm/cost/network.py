"""What ranks send each other in a step, and the seconds it takes. Arithmetic only, no torch.

Letters as in work.py; also L ranks of a host, N = W / L hosts, c bytes of a number that is sent.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dlrm.cost.work import FLOAT, ID, LENGTH, TableWorkload


@dataclass(frozen=True)
class Network:
    """Ranks and the links between them: peak bandwidths, times the share of them that is reached.

    Attributes:
        intra_bytes_per_second: bytes/s that a rank sends to the other ranks of its host.
        inter_bytes_per_second: bytes/s that a host sends to other hosts.
        latency_seconds: time of an empty collective, whatever the number of ranks.
        message_seconds: extra time for each message, as a rank sends them one after the other.
        ring_share: share of these bandwidths that reduce-scatters and all-gathers reach.
        reduction_share: share of these bandwidths that all-reduces reach.
    """

    ranks: int
    ranks_per_host: int
    intra_bytes_per_second: float
    inter_bytes_per_second: float
    latency_seconds: float
    message_seconds: float = 0.0
    ring_share: float = 1.0
    reduction_share: float = 1.0

    @property
    def hosts(self) -> int:
        """Number of hosts, N = W / L."""
        return self.ranks // self.ranks_per_host

    @property
    def neighbours(self) -> int:
        """Messages of a rank to all others, L - 1 + N - 1: one to each rank of its host, one to each other host."""
        return self.ranks_per_host - 1 + self.hosts - 1

    def waiting(self, messages: int) -> float:
        """Seconds of an empty collective: latency + messages * message."""
        return self.latency_seconds + messages * self.message_seconds


@dataclass(frozen=True)
class Collective:
    """One exchange of a step.

    Attributes:
        bytes_per_rank: bytes that leave the rank that sends the most.
        inter_host_bytes: bytes that leave or enter the host with the most of them.
        num_bytes: bytes that all ranks send together.
        bound_by: what takes most of its time.
    """

    name: str
    bytes_per_rank: float
    inter_host_bytes: float
    num_bytes: float
    seconds: float
    bound_by: str


def _timed(
    network: Network,
    name: str,
    per_rank: float,
    local: float,
    inter_host: float,
    total: float,
    messages: int,
    share: float = 1.0,
) -> Collective:
    """A collective with its time: latency + messages * message + max(local / intra, inter_host / inter) / share.

    Args:
        local: bytes within a host, of the rank with the most of them.
        inter_host: bytes between hosts, of the host with the most of them.
        share: share of the bandwidths that this collective reaches.
    """
    limits = {
        "bandwidth within a host": local / network.intra_bytes_per_second / share,
        "bandwidth between hosts": inter_host / network.inter_bytes_per_second / share,
    }
    slowest = max(limits, key=limits.__getitem__)
    waiting = network.waiting(messages)
    bound = "latency" if waiting > limits[slowest] else slowest
    return Collective(name, per_rank, inter_host, total, waiting + limits[slowest], bound)


def all_to_all(
    network: Network, name: str, to_all: Sequence[float], to_peers: Sequence[float], *, reverse: bool = False
) -> Collective:
    """An all-to-all in which ranks send different amounts.

    A rank sends to_all * (L - 1) bytes within its host, and to_all * (W - L) + to_peers * (N - 1) to other hosts, over
    a link that all ranks of its host share. It receives what the others send to it. The largest amount that any rank
    or host sends or receives decides. A rank sends L - 1 messages within its host and N - 1 to other hosts, one after
    the other: what a host's ranks send to one rank elsewhere is sent together (NCCL 2.12's PXN; gloo sends it apart).

    Args:
        to_all: bytes that each rank sends to each other rank.
        to_peers: bytes that each rank sends to the rank with its local number on each other host.
        reverse: everything is sent in the other direction. It takes the same time.
    """
    width, hosts = network.ranks_per_host, network.hosts
    local_sum = [sum(to_all[first : first + width]) for first in range(0, network.ranks, width)]
    peer_sum = [sum(to_peers[number::width]) for number in range(width)]
    whole = sum(to_all)
    sent_local = [size * (width - 1) for size in to_all]
    received_local = [local_sum[rank // width] - to_all[rank] for rank in range(network.ranks)]
    sent_remote = [a * (network.ranks - width) + p * (hosts - 1) for a, p in zip(to_all, to_peers, strict=True)]
    received_remote = [
        whole - local_sum[rank // width] + peer_sum[rank % width] - to_peers[rank] for rank in range(network.ranks)
    ]
    leaving = (received_local, received_remote) if reverse else (sent_local, sent_remote)
    per_rank = max(local + remote for local, remote in zip(*leaving, strict=True))
    by_host = [
        max(sum(remote[first : first + width]) for first in range(0, network.ranks, width))
        for remote in (sent_remote, received_remote)
    ]
    total = sum(sent_local) + sum(sent_remote)
    messages = network.neighbours if any(to_all) else hosts - 1
    return _timed(network, name, per_rank, max(*sent_local, *received_local), max(by_host), total, messages)


def ring(network: Network, name: str, payload: float, *, passes: int = 1) -> Collective:
    """A ring over all ranks: reduce-scatter or all-gather (`passes` 1) or all-reduce (`passes` 2) of `payload` bytes.

    Each rank sends passes * payload * (W - 1) / W bytes to the next rank, and one rank of each host sends them to the
    next host (Patarasuk and Yuan, JPDC 2009), in passes * (W - 1) messages one after the other. An all-reduce uses a
    tree if it waits for fewer messages there: 2 * (L - 1 + log2 N), as NCCL counts them (src/graph/tuning.cc).
    """
    sent = passes * payload * (network.ranks - 1) / network.ranks
    inter_host = sent if network.hosts > 1 else 0.0
    local = sent if network.ranks_per_host > 1 else 0.0
    messages, share = passes * (network.ranks - 1), network.ring_share
    if passes > 1:
        messages = min(messages, passes * (network.ranks_per_host - 1 + math.ceil(math.log2(network.hosts))))
        share = network.reduction_share
    return _timed(network, name, sent, local, inter_host, sent * network.ranks, messages, share)


def host_rings(network: Network, name: str, payloads: Sequence[float]) -> Collective:
    """A ring in each host, of `payloads[host]` bytes: each rank sends payload * (L - 1) / L in L - 1 messages."""
    width = network.ranks_per_host
    sent = [payload * (width - 1) / width for payload in payloads]
    return _timed(network, name, max(sent), max(sent), 0.0, sum(sent) * width, width - 1, network.ring_share)


def input_exchange(network: Network, tables: Sequence[TableWorkload], samples: int) -> list[Collective]:
    """Ids and lengths go to the ranks that hold their tables.

    Each rank sends 4 * B * H / row_splits + 4 * B bytes to each holder of a table. Sizes are exchanged first, and
    lengths and ids separately: that adds the time of two empty all-to-alls.
    """
    received = [0.0] * network.ranks
    for table in _sharded(tables):
        size = ID * samples * table.hotness / table.row_splits + LENGTH * samples
        for rank in table.ranks:
            received[rank] += size
    if network.ranks == 1 or not any(received):
        return []
    nobody = [0.0] * network.ranks
    exchanged = all_to_all(network, "input ids all-to-all", received, nobody, reverse=True)
    return [replace(exchanged, seconds=exchanged.seconds + 2 * network.waiting(network.neighbours))]


def pooled_exchange(network: Network, tables: Sequence[TableWorkload], samples: int) -> list[Collective]:
    """Pooled rows go to the ranks whose samples they belong to."""
    return _exchange(network, tables, samples, "pooled", ("reduce-scatter", "all-to-all"), lambda t: t.pooled_bytes)


def gradient_exchange(network: Network, tables: Sequence[TableWorkload], samples: int) -> list[Collective]:
    """Gradients of pooled rows go back the same way, to the ranks that hold the tables."""
    parts = _exchange(network, tables, samples, "gradient", ("all-gather", "all-to-all"), lambda t: t.gradient_bytes)
    return parts[::-1]


def _exchange(
    network: Network,
    tables: Sequence[TableWorkload],
    samples: int,
    what: str,
    kinds: tuple[str, str],
    width: Callable[[TableWorkload], int],
) -> list[Collective]:
    """Bytes of the exchange, by how tables are split.

    Whole rows: a holder sends c * B * columns to each other rank. Rows split over all ranks: a ring of c * W * B * D.
    Rows split within a host: a ring there of c * W * B * columns, then each of its ranks sends c * B * columns to the
    rank with its local number on each other host.
    """
    if network.ranks == 1:
        return []
    ring_name, exchange_name = (f"{what} {kind}" for kind in kinds)
    to_all, to_peers = [0.0] * network.ranks, [0.0] * network.ranks
    in_hosts, over_all = [0.0] * network.hosts, 0.0
    for table in _sharded(tables):
        for rank, share in zip(table.ranks, table.shares, strict=True):
            size = width(table) * samples * table.columns(share)
            if table.sharding == "row_wise":
                over_all += size  # one of its W parts
            elif table.sharding in ("table_row_wise", "grid_shard"):
                in_hosts[rank // network.ranks_per_host] += size * network.ranks / table.row_splits
                to_peers[rank] += size
            else:
                to_all[rank] += size
    is_back = what == "gradient"
    parts = []
    if over_all:
        parts.append(ring(network, ring_name, over_all))
    if any(in_hosts) and network.ranks_per_host > 1:
        parts.append(host_rings(network, f"{ring_name} in hosts", in_hosts))
    if any(to_all) or (any(to_peers) and network.hosts > 1):
        parts.append(all_to_all(network, exchange_name, to_all, to_peers, reverse=is_back))
    return parts


def dense_reduction(network: Network, parameters: int) -> list[Collective]:
    """All-reduce of the dense gradients, 4 bytes each."""
    return [] if network.ranks == 1 else [ring(network, "dense all-reduce", FLOAT * parameters, passes=2)]


def replicated_reduction(network: Network, tables: Sequence[TableWorkload]) -> list[Collective]:
    """All-reduce of the gradients of replicated tables: all their rows, 4 bytes a number."""
    size = sum(table.weight_bytes for table in tables if table.is_replicated)
    return [] if network.ranks == 1 or not size else [ring(network, "replicated tables all-reduce", size, passes=2)]


def _sharded(tables: Sequence[TableWorkload]) -> list[TableWorkload]:
    return [table for table in tables if not table.is_replicated]
