"""What a training step costs: bytes and operations of its parts, and the seconds these take. Arithmetic only, no torch.

docs/design/plan.md says what is assumed. Letters: B samples of a rank, W ranks, R rows of a table, D its columns, H ids
per sample. Bytes are those of fp32 and int32, 4, where nothing else is said; seconds follow from peak numbers times the
share of them that is reached.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dlrm.config.config import ModelConfig
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES, NUM_INTEGER_FEATURES

FLOAT = 4
ID = 4
LENGTH = 4
LABEL = 4

STATE_COPIES = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 1, "adam": 2}
"""Optimizer state of a dense weight, in floats."""

DEFAULT_CACHE_SHARE = 0.2
"""Of a table's rows, where fused_uvm_caching is not told: TorchRec's load factor."""


@dataclass(frozen=True)
class Rates:
    """What a rank reaches, peak numbers times their efficiency already.

    Attributes:
        flop_per_second: of matrix products.
        bytes_per_second: of device memory.
        host_bytes_per_second: of host memory as the device sees it.
        launch_seconds: least time of a kernel.
        overlaps: what is slower hides the rest. If not, one is after the other.
    """

    flop_per_second: float
    bytes_per_second: float
    host_bytes_per_second: float
    launch_seconds: float
    overlaps: bool = True


@dataclass(frozen=True)
class Work:
    """Operations of matrix products, bytes to or from device memory and host memory, and kernels."""

    flop: float = 0.0
    num_bytes: float = 0.0
    host_bytes: float = 0.0
    kernels: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flop + other.flop,
            self.num_bytes + other.num_bytes,
            self.host_bytes + other.host_bytes,
            self.kernels + other.kernels,
        )

    def limits(self, rates: Rates) -> dict[str, float]:
        """Seconds that each resource needs alone: flop / flop_per_second, bytes / bytes_per_second (s) ..."""
        return {
            "matrix products": self.flop / rates.flop_per_second,
            "memory bandwidth": self.num_bytes / rates.bytes_per_second,
            "host memory bandwidth": self.host_bytes / rates.host_bytes_per_second,
            "kernel launches": self.kernels * rates.launch_seconds,
        }

    def seconds(self, rates: Rates) -> float:
        """The largest of `limits` (s): what is slower hides the rest (roofline; Williams et al., CACM 2009). Their sum
        where nothing hides behind anything."""
        limits = self.limits(rates).values()
        return max(limits) if rates.overlaps else sum(limits)

    def bound_by(self, rates: Rates) -> str:
        """Which of `limits` is the largest."""
        limits = self.limits(rates)
        return max(limits, key=limits.__getitem__)


def expected_distinct(rows: int, ids: float) -> float:
    """Distinct rows among `ids` ids drawn uniformly from `rows` rows: R * (1 - (1 - 1/R)^ids) (rows)."""
    # The same without the difference of two numbers close to 1, which are all that large tables have.
    return float(min(ids, 1)) if rows == 1 else -rows * math.expm1(ids * math.log1p(-1 / rows))


@dataclass(frozen=True)
class Table:
    """A table and who holds which share of it.

    Attributes:
        hotness: ids per sample.
        sharding: TorchRec's sharding type.
        kernel: TorchRec's compute kernel.
        ranks: that hold a part.
        shares: of the table's weights on each of `ranks`; 1 on each where it is data parallel.
        row_splits: ranks that share the rows of a column: all holders, of a grid those of one host.
        state_floats: optimizer state of a row.
        cache_share: of the rows of fused_uvm_caching, in device memory.
        pooled_bytes: of a number of a pooled row as it travels forward.
        gradient_bytes: of its gradient as it travels back.
    """

    name: str
    rows: int
    dim: int
    hotness: int
    sharding: str
    kernel: str
    ranks: tuple[int, ...]
    shares: tuple[float, ...]
    state_floats: float
    row_splits: int = 1
    cache_share: float = DEFAULT_CACHE_SHARE
    pooled_bytes: int = FLOAT
    gradient_bytes: int = FLOAT

    @property
    def is_replicated(self) -> bool:
        """Whether every rank has all of it."""
        return self.sharding == "data_parallel"

    @property
    def weight_bytes(self) -> float:
        """4 * R * D (bytes)."""
        return FLOAT * self.rows * self.dim

    @property
    def state_bytes(self) -> float:
        """4 * R * state_floats (bytes)."""
        return FLOAT * self.rows * self.state_floats

    @property
    def device_share(self) -> float:
        """Of what a rank holds, how much is in device memory: 0 with fused_uvm, the cache with fused_uvm_caching."""
        return {"fused_uvm": 0.0, "fused_uvm_caching": self.cache_share}.get(self.kernel, 1.0)

    def columns(self, share: float) -> float:
        """Columns of a pooled row that come from a rank: D * share where columns are split, else D."""
        if self.sharding in ("column_wise", "table_column_wise"):
            return self.dim * share
        if self.sharding == "grid_shard":  # split by columns over hosts, by rows in a host
            return self.dim * share * self.row_splits
        return self.dim


def lookup_forward(table: Table, share: float, samples: float) -> Work:
    """A rank's lookup in its share of a table for `samples` samples (W * B; B where the table is replicated).

    Bytes: 4 * ids + 4 * distinct * columns + pooled_bytes * samples * columns: ids and each distinct row read once,
    pooled rows written. ids = samples * H / row_splits. Rows in host memory: (1 - device_share) of the row bytes.
    """
    rows, ids, columns = _shard(table, share, samples)
    row_bytes = FLOAT * expected_distinct(rows, ids) * columns
    on_host = row_bytes * (1 - table.device_share)
    return Work(0.0, ID * ids + row_bytes - on_host + table.pooled_bytes * samples * columns, on_host)


def lookup_backward(table: Table, share: float, samples: float) -> Work:
    """Backward of `lookup_forward` with the fused update, or of a replicated table the dense gradient and its update.

    Bytes: 4 * ids + gradient_bytes * samples * columns read; each distinct row and its state (4 * (columns + state
    floats)) read and written. Replicated: all rows, with a gradient that is written, read by the all-reduce and read
    by the update: 4 * R * (2 * (D + state) + 3 * D).
    """
    rows, ids, columns = _shard(table, share, samples)
    num_bytes = ID * ids + table.gradient_bytes * samples * columns
    if table.is_replicated:
        return Work(0.0, num_bytes + 2 * (table.weight_bytes + table.state_bytes) + 3 * table.weight_bytes)
    state = table.state_floats * columns / table.dim if table.state_floats > 1 else table.state_floats
    row_bytes = 2 * FLOAT * expected_distinct(rows, ids) * (columns + state)
    on_host = row_bytes * (1 - table.device_share)
    return Work(0.0, num_bytes + row_bytes - on_host, on_host)


def _shard(table: Table, share: float, samples: float) -> tuple[int, float, float]:
    """Rows, ids and columns of a rank's share."""
    rows = max(1, round(table.rows / table.row_splits))
    return rows, samples * table.hotness / table.row_splits, table.columns(share)


def mlp_work(
    layers: Sequence[int], samples: int, width: int, *, needs_input_gradient: bool = True
) -> tuple[Work, Work]:
    """Forward and backward of an MLP whose layers have these widths, the input's first.

    Flop: 2 * B * weights forward, twice that backward, less 2 * B * first weights where nobody needs the input's
    gradient. Bytes forward: width * B * (inputs + 2 * outputs) of each layer for product, bias and ReLU, and the
    weights; backward twice that. Kernels: 2 a layer forward, 4 backward.
    """
    pairs = list(pairwise(layers))
    weights = sum(inputs * outputs for inputs, outputs in pairs)
    flop = 2 * samples * weights
    num_bytes = width * (samples * sum(inputs + 2 * outputs for inputs, outputs in pairs) + weights)
    spared = 0 if needs_input_gradient else 2 * samples * pairs[0][0] * pairs[0][1]
    forward = Work(flop, num_bytes, 0.0, 2 * len(pairs))
    return forward, Work(2 * flop - spared, 2 * num_bytes, 0.0, 4 * len(pairs))


def interaction_work(model: ModelConfig, samples: int, width: int) -> tuple[Work, Work]:
    """Forward and backward of the interaction of V vectors of D numbers, G = V * D.

    Dot products: flop 2 * B * D * V * (V - 1) / 2 forward and twice that backward; bytes width * B * (G + out) forward,
    width * B * (2 * G + out) backward. DCN: of each cross layer a product G x r and one r x G, flop 4 * B * G * r, and
    bytes width * B * (5 * G + 2 * r) plus weights; backward twice. Projection: two MLPs over G, and flop 2 * B * D * F1
    * F2 with F1 and F2 their widths over D.
    """
    vectors, dim = model.num_vectors, model.embedding_dim
    flat = vectors * dim
    if model.interaction_type == "original":
        pairs = vectors * (vectors - 1) // 2
        flop = 2 * samples * dim * pairs
        out = dim + pairs
        return (
            Work(flop, width * samples * (flat + out), 0.0, 2),
            Work(2 * flop, width * samples * (2 * flat + out), 0.0, 2),
        )
    if model.interaction_type == "dcn":
        rank, layers = model.dcn_low_rank_dim, model.dcn_num_layers
        flop = layers * 4 * samples * flat * rank
        num_bytes = layers * width * (samples * (5 * flat + 2 * rank) + 2 * flat * rank)
        return Work(flop, num_bytes, 0.0, 4 * layers), Work(2 * flop, 2 * num_bytes, 0.0, 8 * layers)
    branches = (model.interaction_branch1_layer_sizes, model.interaction_branch2_layer_sizes)
    forwards, backwards = zip(*(mlp_work((flat, *sizes), samples, width) for sizes in branches), strict=True)
    left, right = (sizes[-1] // dim for sizes in branches)
    flop = 2 * samples * dim * left * right
    num_bytes = width * samples * (dim * (left + right) + left * right)
    return (
        forwards[0] + forwards[1] + Work(flop, num_bytes, 0.0, 2),
        backwards[0] + backwards[1] + Work(2 * flop, 2 * num_bytes, 0.0, 4),
    )


def dense_layers(model: ModelConfig) -> tuple[int, ...]:
    """Widths of the dense arch, from the integers to the embedded vector."""
    inputs = NUM_INTEGER_FEATURES * (2 if model.standardize_dense else 1)
    return (inputs, *model.dense_arch_layer_sizes)


def interaction_width(model: ModelConfig) -> int:
    """Numbers of a sample that leave the interaction."""
    vectors, dim = model.num_vectors, model.embedding_dim
    match model.interaction_type:
        case "original":
            return dim + vectors * (vectors - 1) // 2
        case "dcn":
            return vectors * dim
        case "projection":
            left, right = model.interaction_branch1_layer_sizes[-1], model.interaction_branch2_layer_sizes[-1]
            return dim + (left // dim) * (right // dim)


def over_layers(model: ModelConfig) -> tuple[int, ...]:
    """Widths of the over arch, from the interaction to the logit."""
    return (interaction_width(model), *model.over_arch_layer_sizes)


def dense_parameters(model: ModelConfig) -> int:
    """Weights and biases of all that is data parallel but tables: both archs, the interaction, buckets' embeddings."""
    flat = model.num_vectors * model.embedding_dim
    stacks = [dense_layers(model), over_layers(model)]
    parameters = 0
    if model.interaction_type == "dcn":
        parameters += model.dcn_num_layers * (2 * flat * model.dcn_low_rank_dim + flat)
    if model.interaction_type == "projection":
        stacks += [(flat, *model.interaction_branch1_layer_sizes), (flat, *model.interaction_branch2_layer_sizes)]
    parameters += sum((inputs + 1) * outputs for layers in stacks for inputs, outputs in pairwise(layers))
    if model.dense_buckets:
        parameters += NUM_INTEGER_FEATURES * (model.dense_buckets + 1) * model.embedding_dim
    return parameters


def update_work(parameters: int, optimizer: str) -> Work:
    """The optimizer's pass over dense parameters: gradient read, weight and state read and written.

    Bytes: 4 * parameters * (3 + 2 * state copies).
    """
    return Work(0.0, FLOAT * parameters * (3 + 2 * STATE_COPIES[optimizer]), 0.0, 2)


def sample_bytes(hotness: Sequence[int]) -> int:
    """Of a sample in a batch: 13 integers, the ids, their 26 lengths, the label (bytes)."""
    return FLOAT * NUM_INTEGER_FEATURES + ID * sum(hotness) + LENGTH * NUM_CATEGORICAL_FEATURES + LABEL
