"""What ranks send each other in a step, and the seconds it takes. Arithmetic only, no torch.

Letters as in cost.py; L ranks of a host, N = W / L hosts, c bytes of a number that travels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dlrm.cost.work import FLOAT, ID, LENGTH, Table


@dataclass(frozen=True)
class Network:
    """Ranks and what links them, peak numbers times their efficiency already.

    Attributes:
        intra_bytes_per_second: that a rank sends to its host's others.
        inter_bytes_per_second: that a host sends to other hosts.
        latency_seconds: of a collective of no bytes, however many ranks it has.
        message_seconds: what it takes more for each message that a rank sends after another.
        ring_share: bandwidth of reduce-scatters and all-gathers, over these.
        reduction_share: bandwidth of all-reduces, over these.
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
        """N = W / L."""
        return self.ranks // self.ranks_per_host

    @property
    def neighbours(self) -> int:
        """Messages of a rank to all others, one to each of its host and to each other host: L - 1 + N - 1."""
        return self.ranks_per_host - 1 + self.hosts - 1

    def waiting(self, messages: int) -> float:
        """latency + messages * message (s): of a collective of no bytes."""
        return self.latency_seconds + messages * self.message_seconds


@dataclass(frozen=True)
class Collective:
    """One exchange of a step.

    Attributes:
        bytes_per_rank: that leave a rank, the most of any.
        inter_host_bytes: that leave or enter a host, the most of any.
        num_bytes: that leave all ranks.
        bound_by: what takes the longest in it.
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
    """seconds = latency + messages * message + max(local / intra, inter_host / inter) / share; `local` is the most of a
    rank, `share` of the bandwidths is what this collective reaches."""
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
    """An exchange in which rank r sends `to_all[r]` bytes to each other rank, and `to_peers[r]` to its namesake (the
    rank with its local number) on each other host. `reverse`: in the other direction, with the same time.

    A rank sends to_all * (L - 1) within its host, and to_all * (W - L) + to_peers * (N - 1) to others, which all ranks
    of a host share. It receives what the others send it. The largest of sent and received of any rank or host counts.
    L - 1 messages one after the other within its host, and N - 1 to others: what a host's ranks send to one rank
    elsewhere travels together (NCCL 2.12's PXN; gloo sends each by itself).
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
    """A ring over all ranks: reduce-scatter or all-gather (`passes` 1) or all-reduce (2) of `payload` bytes.

    Each rank sends passes * payload * (W - 1) / W bytes to the next, of each host one to the next host (Patarasuk and
    Yuan, JPDC 2009), in passes * (W - 1) messages one after the other. An all-reduce that waits for fewer in a tree,
    2 * (L - 1 + log2 N) as NCCL reckons (src/graph/tuning.cc), takes that.
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
    """A ring in each host, of `payloads[host]` bytes: each of its ranks sends payload * (L - 1) / L, in L - 1
    messages."""
    width = network.ranks_per_host
    sent = [payload * (width - 1) / width for payload in payloads]
    return _timed(network, name, max(sent), max(sent), 0.0, sum(sent) * width, width - 1, network.ring_share)


def input_exchange(network: Network, tables: Sequence[Table], samples: int) -> list[Collective]:
    """Ids and lengths to the ranks that hold their tables: from each rank 4 * B * H / row_splits + 4 * B bytes to each
    holder. First the sizes are exchanged, then lengths and ids apart: two all-to-alls of no bytes more."""
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


def pooled_exchange(network: Network, tables: Sequence[Table], samples: int) -> list[Collective]:
    """Pooled rows to the ranks whose samples they are."""
    return _exchange(network, tables, samples, "pooled", ("reduce-scatter", "all-to-all"), lambda t: t.pooled_bytes)


def gradient_exchange(network: Network, tables: Sequence[Table], samples: int) -> list[Collective]:
    """Gradients of pooled rows to the ranks that hold the tables: the same ways back."""
    parts = _exchange(network, tables, samples, "gradient", ("all-gather", "all-to-all"), lambda t: t.gradient_bytes)
    return parts[::-1]


def _exchange(
    network: Network,
    tables: Sequence[Table],
    samples: int,
    what: str,
    kinds: tuple[str, str],
    width: Callable[[Table], int],
) -> list[Collective]:
    """Whole rows: c * B * columns from a holder to each other rank. Split by rows over all ranks: a ring of c * W * B *
    D bytes. Split by rows in a host: a ring there of c * W * B * columns, then c * B * columns from each of its ranks
    to its namesake on each other host."""
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


def replicated_reduction(network: Network, tables: Sequence[Table]) -> list[Collective]:
    """All-reduce of the gradients of replicated tables, all their rows, 4 bytes a number."""
    size = sum(table.weight_bytes for table in tables if table.is_replicated)
    return [] if network.ranks == 1 or not size else [ring(network, "replicated tables all-reduce", size, passes=2)]


def _sharded(tables: Sequence[Table]) -> list[Table]:
    return [table for table in tables if not table.is_replicated]
