"""The cost model against sums done by hand, and what must hold whatever the numbers."""

import dataclasses
import subprocess
import sys
from itertools import accumulate, pairwise

import pytest

from dlrm.config.config import ModelConfig
from dlrm.cost import work as cost
from dlrm.cost.hardware import GIB, KINDS, ClusterShape, HardwareConfig, hardware_of, parse_cluster
from dlrm.cost.memory import memory_of_ranks
from dlrm.cost.network import (
    Network,
    all_to_all,
    dense_reduction,
    gradient_exchange,
    host_rings,
    input_exchange,
    pooled_exchange,
    replicated_reduction,
    ring,
)
from dlrm.cost.step import Step, StepWorkload, build_step
from dlrm.cost.work import Rates, TableWorkload, Work
from dlrm.errors import ConfigError

RATES = Rates(1e12, 1e11, 1e10, 1e-6)
MODEL = ModelConfig(embedding_dim=4, dense_arch_layer_sizes=(8, 4), over_arch_layer_sizes=(16, 1))


def make_table(sharding: str = "table_wise", ranks: tuple[int, ...] = (0,), **values: object) -> TableWorkload:
    count = len(ranks)
    shares = (1.0,) * count if sharding == "data_parallel" else (1 / count,) * count
    row_splits = count if sharding in ("row_wise", "table_row_wise") else 1
    known = {"rows": 10, "dim": 4, "hotness": 1, "kernel": "fused", "state_floats": 0, "row_splits": row_splits}
    return TableWorkload(name="t", sharding=sharding, ranks=ranks, shares=shares, **{**known, **values})


def make_network(ranks: int, ranks_per_host: int, intra: float = 1.0, inter: float = 1.0) -> Network:
    return Network(ranks, ranks_per_host, intra, inter, 0.0)


@pytest.mark.parametrize(("rows", "ids", "distinct"), [(1, 5, 1), (10, 1, 1), (2, 2, 1.5), (4, 2, 1.75), (7, 0, 0)])
def test_distinct_rows(rows: int, ids: int, distinct: float) -> None:
    assert cost.expected_distinct(rows, ids) == pytest.approx(distinct)


def test_the_slowest_resource_is_the_bound() -> None:
    work = Work(flop=2e12, num_bytes=1e11, host_bytes=1e9, kernels=10)
    assert work.seconds(RATES) == 2.0
    assert work.bound_by(RATES) == "matrix products"
    assert Work(num_bytes=1e11, host_bytes=2e10).bound_by(RATES) == "host memory bandwidth"
    assert Work(kernels=5).seconds(RATES) == pytest.approx(5e-6)
    assert work + Work(1.0, 2.0, 3.0, 4) == Work(2e12 + 1, 1e11 + 2, 1e9 + 3, 14)


def test_mlp_by_hand() -> None:
    # 13 x 4 + 4 x 1 = 56 weights; 2 samples; (13 + 2 x 4) + (4 + 2 x 1) = 27 numbers a sample pass through memory.
    forward, backward = cost.mlp_work((13, 4, 1), 2, 4)
    assert forward == Work(2 * 2 * 56, 4 * (2 * 27 + 56), 0.0, 4)
    assert backward == Work(2 * 2 * 2 * 56, 2 * 4 * (2 * 27 + 56), 0.0, 8)
    _, spared = cost.mlp_work((13, 4, 1), 2, 4, needs_input_gradient=False)
    assert spared.flop == 2 * 2 * 2 * 56 - 2 * 2 * 13 * 4


def test_interactions_by_hand() -> None:
    forward, backward = cost.interaction_work(MODEL, 3, 4)  # 27 vectors of 4, 351 pairs
    assert (forward.flop, forward.num_bytes) == (2 * 3 * 4 * 351, 4 * 3 * (108 + 355))
    assert (backward.flop, backward.num_bytes) == (2 * forward.flop, 4 * 3 * (216 + 355))
    dcn = dataclasses.replace(MODEL, interaction_type="dcn", dcn_num_layers=2, dcn_low_rank_dim=5)
    forward, backward = cost.interaction_work(dcn, 3, 2)
    assert forward.flop == 2 * (2 * 2 * 3 * 108 * 5)
    assert backward.flop == 2 * forward.flop
    branches = {"interaction_branch1_layer_sizes": (8,), "interaction_branch2_layer_sizes": (16,)}
    projection = dataclasses.replace(MODEL, interaction_type="projection", **branches)
    assert cost.interaction_work(projection, 3, 4)[0].flop == 2 * 3 * (108 * 8 + 108 * 16 + 4 * 2 * 4)
    assert [cost.interaction_width(model) for model in (MODEL, dcn, projection)] == [4 + 351, 108, 4 + 2 * 4]


@pytest.mark.parametrize(("state_floats", "num_bytes"), [(0, 4 + 16 + 32), (4, 4 + 16 + 64), (1, 4 + 16 + 40)])
def test_lookups_by_hand(state_floats: float, num_bytes: float) -> None:
    table = make_table(state_floats=state_floats)  # one sample: an id, a row of 16 bytes, a pooled row of 16
    assert cost.lookup_forward(table, 1.0, 1).num_bytes == 4 + 16 + 16
    assert cost.lookup_backward(table, 1.0, 1).num_bytes == pytest.approx(num_bytes)


def test_shares_of_lookups_by_hand() -> None:
    by_rows = make_table("row_wise", (0, 1))  # of 2 ids one falls to each rank; both pool rows for 2 samples
    assert cost.lookup_forward(by_rows, 0.5, 2).num_bytes == pytest.approx(4 + 16 + 2 * 16)
    by_columns = make_table("column_wise", (0, 1))
    assert cost.lookup_forward(by_columns, 0.5, 1).num_bytes == pytest.approx(4 + 8 + 8)
    grid = make_table("grid_shard", (0, 1, 2, 3), row_splits=2)
    assert grid.columns(0.25) == 2
    everywhere = make_table("data_parallel", (0, 1))
    weights = 10 * 4 * 4
    assert cost.lookup_backward(everywhere, 1.0, 1).num_bytes == 4 + 16 + 5 * weights


def test_rows_in_host_memory_by_hand() -> None:
    in_host, cached = make_table(kernel="fused_uvm"), make_table(kernel="fused_uvm_caching", cache_share=0.25)
    assert cost.lookup_forward(in_host, 1.0, 1) == Work(0.0, pytest.approx(4 + 16), pytest.approx(16))
    assert cost.lookup_forward(cached, 1.0, 1) == Work(0.0, pytest.approx(4 + 4 + 16), pytest.approx(12))


def test_all_to_all_by_hand() -> None:
    network = make_network(4, 2, intra=2.0, inter=1.0)  # 2 hosts of 2: a rank has 1 neighbour and 2 others
    one = all_to_all(network, "x", [8, 0, 0, 0], [0, 0, 0, 0])
    assert (one.bytes_per_rank, one.inter_host_bytes, one.num_bytes) == (24, 16, 24)
    assert (one.seconds, one.bound_by) == (16, "bandwidth between hosts")
    back = all_to_all(network, "x", [8, 0, 0, 0], [0, 0, 0, 0], reverse=True)
    assert (back.bytes_per_rank, back.inter_host_bytes, back.num_bytes, back.seconds) == (8, 16, 24, 16)
    peers = all_to_all(network, "x", [0, 0, 0, 0], [4, 4, 0, 0])
    assert (peers.bytes_per_rank, peers.inter_host_bytes, peers.num_bytes) == (4, 8, 8)
    within = all_to_all(make_network(2, 2, intra=2.0), "x", [8, 0], [0, 0])
    assert (within.seconds, within.inter_host_bytes, within.bound_by) == (4, 0, "bandwidth within a host")


def test_rings_by_hand() -> None:
    assert ring(make_network(4, 4, intra=3.0), "x", 100).seconds == 25
    reduction = ring(make_network(4, 2, intra=3.0, inter=1.0), "x", 100, passes=2)
    assert (reduction.bytes_per_rank, reduction.inter_host_bytes, reduction.seconds) == (150, 150, 150)
    in_hosts = host_rings(make_network(4, 2), "x", [100, 40])
    assert (in_hosts.bytes_per_rank, in_hosts.num_bytes, in_hosts.seconds) == (50, 140, 50)
    late = Network(2, 2, 1.0, 1.0, 1000.0)
    assert ring(late, "x", 2).bound_by == "latency"


def test_messages_by_hand() -> None:
    network = Network(16, 8, 1e12, 1e12, 1.0, 0.5)  # 2 hosts of 8; bytes cost next to nothing
    nobody = [0.0] * 16
    # To 7 of its host, and to the other host together; as namesakes to the other host alone.
    assert all_to_all(network, "x", [8.0] * 16, nobody).seconds == pytest.approx(1 + 0.5 * 8)
    assert all_to_all(network, "x", nobody, [8.0] * 16).seconds == pytest.approx(1 + 0.5 * 1)
    assert ring(network, "x", 8).seconds == pytest.approx(1 + 0.5 * 15)
    # An all-reduce takes a tree, up and down: 7 hops in a host and 1 between 2 hosts, instead of 30 in a ring.
    assert ring(network, "x", 8, passes=2).seconds == pytest.approx(1 + 0.5 * 2 * 8)
    assert ring(Network(3, 3, 1e12, 1e12, 1.0, 0.5), "x", 8, passes=2).seconds == pytest.approx(1 + 0.5 * 2 * 2)
    assert host_rings(network, "x", [8, 8]).seconds == pytest.approx(1 + 0.5 * 7)
    (ids,) = input_exchange(network, [make_table()], 1)
    assert ids.seconds == pytest.approx(3 * (1 + 0.5 * 8))
    assert ids.bound_by == "latency"


def test_shares_of_bandwidths_by_hand() -> None:
    network = dataclasses.replace(make_network(4, 4, intra=3.0), ring_share=0.5, reduction_share=2.0)
    assert ring(network, "x", 100).seconds == 25 / 0.5
    assert ring(network, "x", 100, passes=2).seconds == 50 / 2
    assert host_rings(network, "x", [100]).seconds == 25 / 0.5
    assert all_to_all(network, "x", [8, 0, 0, 0], [0] * 4).seconds == 8  # 24 bytes at 3


def test_exchanges_by_hand() -> None:
    network = make_network(4, 2)
    table = make_table(ranks=(1,), hotness=3)
    (ids,) = input_exchange(network, [table], 5)
    assert ids.num_bytes == 3 * (5 * 3 * 4 + 5 * 4)  # from three other ranks: 15 ids and 5 lengths
    (pooled,) = pooled_exchange(network, [table], 5)
    assert (pooled.name, pooled.num_bytes) == ("pooled all-to-all", 3 * 5 * 16)
    half = dataclasses.replace(table, gradient_bytes=2)
    assert gradient_exchange(network, [half], 5)[0].num_bytes == 3 * 5 * 8
    (by_rows,) = pooled_exchange(network, [make_table("row_wise", (0, 1, 2, 3))], 5)
    assert (by_rows.name, by_rows.bytes_per_rank) == ("pooled reduce-scatter", 3 / 4 * (4 * 5 * 16))
    in_host, between = pooled_exchange(network, [make_table("table_row_wise", (2, 3))], 5)
    assert (in_host.name, in_host.bytes_per_rank) == ("pooled reduce-scatter in hosts", 1 / 2 * (4 * 5 * 16))
    assert (between.inter_host_bytes, between.num_bytes) == (2 * 5 * 16, 2 * 5 * 16)
    assert [part.name for part in gradient_exchange(network, [make_table("table_row_wise", (2, 3))], 5)] == [
        "gradient all-to-all",
        "gradient all-gather in hosts",
    ]
    replicated = make_table("data_parallel", (0, 1, 2, 3))
    assert pooled_exchange(network, [replicated], 5) == input_exchange(network, [replicated], 5) == []
    assert replicated_reduction(network, [replicated])[0].bytes_per_rank == 2 * 3 / 4 * 160
    assert dense_reduction(network, 100)[0].bytes_per_rank == 2 * 3 / 4 * 400


def test_one_rank_sends_nothing() -> None:
    alone, table = make_network(1, 1), make_table()
    assert not input_exchange(alone, [table], 5) + pooled_exchange(alone, [table], 5) + dense_reduction(alone, 9)
    step = make_step(alone)
    assert step.exposed_communication_seconds == pytest.approx(0)
    assert step.seconds == pytest.approx(step.seconds_of("lookup") + step.seconds_of("dense"))


def make_step(
    network: Network, rates: Rates = RATES, tables: list[TableWorkload] | None = None, **values: object
) -> Step:
    held = tables or [make_table(ranks=(i % network.ranks,), rows=1000) for i in range(26)]
    known = {"batch_size": 64, "width": 4, "optimizer": "sgd", "hides_input": True, "launches": True}
    return build_step(StepWorkload(MODEL, held, **{**known, **values}), rates, network)


NETWORK = Network(8, 4, 1e9, 1e8, 1e-5)


def test_a_step_adds_up() -> None:
    step = make_step(NETWORK)
    parts = step.seconds_of("lookup") + step.seconds_of("dense") + step.exposed_communication_seconds
    assert parts == pytest.approx(step.seconds)
    assert step.samples_per_second == pytest.approx(8 * 64 / step.seconds)
    assert step.seconds >= step.seconds_of("communication")
    for lane in (("lookup", "dense"), ("communication",)):
        spans = sorted((s for s in step.spans if s.part in lane and "input" not in s.name), key=lambda span: span.start)
        ends = accumulate((span.end for span in spans), max)
        assert all(after.start >= end - 1e-12 for end, after in zip(ends, spans[1:], strict=False))
    assert "between hosts" in step.bound_by


def test_cores_do_one_thing_after_the_other() -> None:
    cores = dataclasses.replace(RATES, overlaps=False)
    work = Work(flop=2e12, num_bytes=1e11, host_bytes=1e9, kernels=10)
    assert work.seconds(cores) == pytest.approx(2 + 1 + 0.1 + 1e-5)
    assert work.bound_by(cores) == "matrix products"
    step = make_step(NETWORK, cores)
    spans = sorted(step.spans, key=lambda span: span.start)
    assert [span.end for span in spans[:-1]] == pytest.approx([span.start for span in spans[1:]])
    assert step.seconds == pytest.approx(sum(span.seconds for span in spans))
    assert step.exposed_communication_seconds == pytest.approx(step.seconds_of("communication"))
    assert step.seconds > make_step(NETWORK).seconds
    # A pipeline has nothing to hide the ids behind.
    assert make_step(NETWORK, cores, hides_input=False).seconds == step.seconds


def test_what_is_faster_takes_no_longer() -> None:
    seconds = make_step(NETWORK).seconds
    for name in ("flop_per_second", "bytes_per_second", "host_bytes_per_second"):
        faster = dataclasses.replace(RATES, **{name: 2 * getattr(RATES, name)})
        assert make_step(NETWORK, faster).seconds <= seconds
    for name in ("intra_bytes_per_second", "inter_bytes_per_second"):
        faster = dataclasses.replace(NETWORK, **{name: 2 * getattr(NETWORK, name)})
        assert make_step(faster).seconds <= seconds
    assert make_step(NETWORK, hides_input=False).seconds >= seconds
    assert make_step(NETWORK, launches=False).seconds <= seconds
    times = [make_step(NETWORK, batch_size=size).seconds for size in (1, 16, 256, 4096)]
    assert times == sorted(times)
    rates = [make_step(NETWORK, batch_size=size).samples_per_second for size in (1, 16, 256, 4096)]
    assert rates == sorted(rates)  # larger batches share latencies and the dense all-reduce


def test_the_memory_of_a_rank_adds_up() -> None:
    tables = [make_table(ranks=(0,), rows=1_000_000, state_floats=4), make_table(kernel="fused_uvm", rows=1_000_000)]
    ranks = memory_of_ranks(MODEL, tables, "adagrad", "sparse_dist", 64, 4, 2, 1e9, 0.15)
    parameters = cost.dense_parameters(MODEL)
    assert ranks[0].weights == 16e6 + 4 * parameters
    assert ranks[0].optimizer == 16e6 + 4 * parameters
    assert (ranks[0].on_host, ranks[1].on_host) == (16e6, 0)
    assert ranks[1].weights == 4 * parameters
    assert memory_of_ranks(MODEL, tables, "sgd", "base", 10**7, 4, 2, 1e9, 0.15)[0].free < 0


def test_activations_and_gradients_by_hand() -> None:
    model = ModelConfig(embedding_dim=4, dense_arch_layer_sizes=(8, 4), over_arch_layer_sizes=(16, 1))
    sharded, replicated = make_table(ranks=(1,), hotness=3), make_table("data_parallel", (0, 1), rows=50)
    (first, second), samples = memory_of_ranks(model, [sharded, replicated], "sgd", "base", 10, 4, 2, 1e9, 0.15), 10
    batches = 2 * samples * cost.sample_bytes([sharded.hotness, replicated.hotness])
    interaction = 27 * 26 // 2 + 4
    layers = 4 * samples * ((8 + 4 + interaction + 16 + 1) + 2 * 27 * 4 + 2 * interaction)
    gradients = 4 * cost.dense_parameters(model) + 4 * 50 * replicated.dim
    own = samples * (sharded.dim + replicated.dim) * 8  # pooled rows and their gradients, for its own samples
    in_replica = 2 * samples * (4 * replicated.hotness + 4) + samples * replicated.dim * 8
    assert first.activations == batches + layers + gradients + own + in_replica
    holder = 2 * 2 * samples * (4 * 3 + 4) + 2 * samples * sharded.dim * 8  # both ranks' ids, pooled rows, gradients
    assert second.activations == first.activations + holder


def test_clusters() -> None:
    assert parse_cluster("a100_40gb:2x8") == ClusterShape("a100_40gb", 2, 8)
    assert parse_cluster("cpu:1x64").describe() == "cpu:1x64, 1 host of 64 devices, 64 ranks"
    assert str(parse_cluster("b200:10x8")) == "b200:10x8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a100_40gb", r"'a100_40gb': expected KIND:HOSTSxDEVICES, as in a100_40gb:2x8"),
        ("a100_40gb:-1x8", "expected KIND:HOSTSxDEVICES"),
        ("v100:1x8", "no kind v100, expected one of a100_40gb"),
        ("h100:0x8", "0 hosts of 8 devices"),
        ("h100:8x80", r"80 devices a host, expected 16 or fewer\. Hosts come first: h100:80x8\?"),
        ("h100:99x99", r"99 devices a host, expected 16 or fewer\.$"),
        ("h100:1000x8", "8,000 ranks, expected 4,096 or fewer"),
    ],
)
def test_clusters_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_cluster(text)


def test_hardware_by_flags() -> None:
    config = HardwareConfig(
        memory_bandwidth=1000, bf16_tflops=5, collective_latency_us=3, host_memory_gib=64, message_us=2
    )
    gpu = hardware_of(parse_cluster("h100:1x8"), config, 10, 2, 1)
    assert (gpu.memory_bytes, gpu.memory_bandwidth, gpu.host_memory_bytes) == (10 * GIB, 1000 * GIB, 64 * GIB)
    assert (gpu.intra_host_bandwidth, gpu.inter_host_bandwidth) == (2 * GIB, GIB)
    assert gpu.matrix_rates == {**KINDS["h100"].matrix_rates, "bf16": 5e12}
    assert gpu.collective_seconds == pytest.approx(3e-6)
    assert gpu.message_seconds == pytest.approx(2e-6)
    cpu = hardware_of(parse_cluster("cpu:2x4"), config, None, None, None)
    assert (cpu.memory_bytes, cpu.memory_bandwidth) == (16 * GIB, 250 * GIB)  # a quarter of the host's
    assert cpu.inter_host_bandwidth == KINDS["cpu"].inter_host_bandwidth


def test_efficiencies_are_the_kinds_unless_flags_say_otherwise() -> None:
    config = HardwareConfig(memory_efficiency=0.25)
    for kind in KINDS:
        found = hardware_of(ClusterShape(kind, 1, 2), config, None, None, None)
        assert found.memory_efficiency == 0.25
        assert found.matrix_efficiency == KINDS[kind].matrix_efficiency
        assert found.network_efficiency == KINDS[kind].network_efficiency
    gpus = [kind for kind in KINDS.values() if kind.device == "cuda"]
    assert {(kind.matrix_efficiency, kind.overlaps) for kind in gpus} == {(0.7, True)}
    assert not KINDS["cpu"].overlaps


def test_newer_kinds_are_not_slower() -> None:
    order = [KINDS[kind] for kind in ("a100_40gb", "a100_80gb", "h100", "h200", "b200")]
    for older, newer in pairwise(order):
        assert newer.memory_bytes >= older.memory_bytes
        assert newer.memory_bandwidth > older.memory_bandwidth
        assert all(newer.matrix_rates[name] >= rate for name, rate in older.matrix_rates.items())


def test_the_cost_model_loads_no_torch() -> None:
    code = "import sys, dlrm.plan.command, dlrm.cost.step; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
