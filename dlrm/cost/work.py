"""What the parts of a training step cost: operations, bytes, and the seconds they take. Arithmetic only, no torch.

`dlrm plan` expects these of our operators; `least_work.py` derives the floor of `dlrm bench` from them.
docs/design/plan.md says what is assumed.

Letters: B samples of a rank, W ranks, R rows of a table, D its columns, H ids per sample, V vectors that interact.
A number has 4 bytes (fp32, int32) unless something else is said.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dlrm.config.config import ModelConfig, OptimizerName
from dlrm.cost.optimizer_state import state_floats
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES, NUM_INTEGER_FEATURES

FLOAT = 4
ID = 4
LENGTH = 4
LABEL = 4

DEFAULT_CACHE_SHARE = 0.2
"""Share of a table's rows that fused_uvm_caching caches by default: TorchRec's load factor."""


@dataclass(frozen=True)
class Rates:
    """Rates that a rank reaches: peak numbers, times the share of them that is reached.

    Attributes:
        flop_per_second: operations/s of matrix products.
        bytes_per_second: bytes/s of device memory.
        host_bytes_per_second: bytes/s of host memory, read or written by the device.
        launch_seconds: least time of a kernel.
        overlaps: whether the slowest resource hides the others. If not, their times add up.
    """

    flop_per_second: float
    bytes_per_second: float
    host_bytes_per_second: float
    launch_seconds: float
    overlaps: bool = True


@dataclass(frozen=True)
class Work:
    """What some part of a step uses of each resource.

    Attributes:
        flop: floating point operations of matrix products.
        num_bytes: bytes read from or written to device memory.
        host_bytes: bytes read from or written to host memory.
        kernels: kernels that are launched.
    """

    flop: float = 0
    num_bytes: float = 0
    host_bytes: float = 0
    kernels: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flop + other.flop,
            self.num_bytes + other.num_bytes,
            self.host_bytes + other.host_bytes,
            self.kernels + other.kernels,
        )

    def limits(self, rates: Rates) -> dict[str, float]:
        """Seconds that each resource alone would need: flop / flop_per_second, bytes / bytes_per_second, ..."""
        return {
            "matrix products": self.flop / rates.flop_per_second,
            "memory bandwidth": self.num_bytes / rates.bytes_per_second,
            "host memory bandwidth": self.host_bytes / rates.host_bytes_per_second,
            "kernel launches": self.kernels * rates.launch_seconds,
        }

    def seconds(self, rates: Rates) -> float:
        """The largest of `limits` (roofline; Williams et al., CACM 2009), or their sum if nothing overlaps."""
        limits = self.limits(rates).values()
        return max(limits) if rates.overlaps else sum(limits)

    def bound_by(self, rates: Rates) -> str:
        """The name of the largest of `limits`."""
        limits = self.limits(rates)
        return max(limits, key=limits.__getitem__)


def expected_distinct(rows: int, ids: float) -> float:
    """Expected distinct rows among `ids` ids that are drawn uniformly: R * (1 - (1 - 1/R)^ids)."""
    # For a large table (1 - 1/R)^ids is close to 1, and 1 - that would lose most digits: expm1 and log1p do not.
    return float(min(ids, 1)) if rows == 1 else -rows * math.expm1(ids * math.log1p(-1 / rows))


@dataclass(frozen=True)
class TableWorkload:
    """A table as a step uses it, and which rank holds which share of it.

    Attributes:
        hotness: ids per sample.
        sharding: TorchRec's sharding type.
        kernel: TorchRec's compute kernel.
        ranks: ranks that hold a part.
        shares: share of the table's weights on each of `ranks`; 1 on each if the table is data parallel.
        state_floats: optimizer state of a row, in floats.
        row_splits: ranks that share the rows of a column: all holders, or of a grid those of one host.
        cache_share: share of the rows that fused_uvm_caching keeps in device memory.
        pooled_bytes: bytes of each number of a pooled row that is sent.
        gradient_bytes: bytes of each number of its gradient that is sent back.
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
        """Whether every rank holds the whole table."""
        return self.sharding == "data_parallel"

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights: 4 * R * D."""
        return FLOAT * self.rows * self.dim

    @property
    def state_bytes(self) -> float:
        """Bytes of the optimizer state: 4 * R * state_floats."""
        return FLOAT * self.rows * self.state_floats

    @property
    def device_share(self) -> float:
        """Share of a rank's part that is in device memory: 0 with fused_uvm, the cache with fused_uvm_caching."""
        return {"fused_uvm": 0.0, "fused_uvm_caching": self.cache_share}.get(self.kernel, 1.0)

    def columns(self, share: float) -> float:
        """Columns of a pooled row that come from a rank: D * share if columns are split, else D."""
        if self.sharding in ("column_wise", "table_column_wise"):
            return self.dim * share
        if self.sharding == "grid_shard":  # split by columns over hosts, by rows in a host
            return self.dim * share * self.row_splits
        return self.dim


def row_bytes(rows: float, columns: float) -> float:
    """Bytes of `rows` rows: 4 * rows * columns."""
    return FLOAT * rows * columns


def update_bytes(rows: float, columns: float, state: float) -> float:
    """Bytes of an update: rows and `state` floats of each are read and written, 2 * 4 * rows * (columns + state)."""
    return 2 * FLOAT * rows * (columns + state)


def lookup_forward(table: TableWorkload, share: float, samples: float) -> Work:
    """A rank's lookup in its share of a table, for `samples` samples: W * B, or B if the table is replicated.

    Bytes: 4 * ids + 4 * distinct * columns + pooled_bytes * samples * columns. Ids and each distinct row are read once,
    pooled rows are written. ids = samples * H / row_splits. Of the row bytes (1 - device_share) are in host memory.
    """
    rows, ids, columns = _shard(table, share, samples)
    read = row_bytes(expected_distinct(rows, ids), columns)
    on_host = read * (1 - table.device_share)
    return Work(0, ID * ids + read - on_host + table.pooled_bytes * samples * columns, on_host)


def lookup_backward(table: TableWorkload, share: float, samples: float) -> Work:
    """Backward of `lookup_forward` with the fused update; for a replicated table the dense gradient and its update.

    Bytes: 4 * ids + gradient_bytes * samples * columns are read; each distinct row and its state, 4 * (columns + state
    floats), are read and written. Replicated: the same for all rows, with a gradient that is written, read by the
    all-reduce and read by the update: 4 * R * (2 * (D + state) + 3 * D).
    """
    rows, ids, columns = _shard(table, share, samples)
    num_bytes = ID * ids + table.gradient_bytes * samples * columns
    if table.is_replicated:
        return Work(0, num_bytes + 2 * (table.weight_bytes + table.state_bytes) + 3 * table.weight_bytes)
    # One float per row (row-wise Adagrad) is kept on every rank that holds columns of it; more are split with them.
    state = table.state_floats * columns / table.dim if table.state_floats > 1 else table.state_floats
    updated = update_bytes(expected_distinct(rows, ids), columns, state)
    on_host = updated * (1 - table.device_share)
    return Work(0, num_bytes + updated - on_host, on_host)


def _shard(table: TableWorkload, share: float, samples: float) -> tuple[int, float, float]:
    """Rows and columns of a rank's share, and the ids that fall into it: (rows, ids, columns)."""
    rows = max(1, round(table.rows / table.row_splits))
    return rows, samples * table.hotness / table.row_splits, table.columns(share)


def mlp_work(
    layers: Sequence[int], samples: int, width: int, *, needs_input_gradient: bool = True
) -> tuple[Work, Work]:
    """Forward and backward work of an MLP.

    Flop: 2 * B * weights forward, twice that backward, less 2 * B * the first layer's weights if the gradient of the
    input is not needed. Bytes forward: width * B * (inputs + 2 * outputs) of each layer, for product, bias and ReLU,
    and the weights; backward twice that. Kernels: 2 per layer forward, 4 backward.

    Args:
        layers: width of the input, then of each layer's output.
        width: bytes of an activation.
        needs_input_gradient: whether something before the MLP is trained.
    """
    pairs = list(pairwise(layers))
    weights = sum(inputs * outputs for inputs, outputs in pairs)
    flop = 2 * samples * weights
    num_bytes = width * (samples * sum(inputs + 2 * outputs for inputs, outputs in pairs) + weights)
    spared = 0 if needs_input_gradient else 2 * samples * pairs[0][0] * pairs[0][1]
    forward = Work(flop, num_bytes, 0, 2 * len(pairs))
    return forward, Work(2 * flop - spared, 2 * num_bytes, 0, 4 * len(pairs))


def interaction_work(model: ModelConfig, samples: int, width: int) -> tuple[Work, Work]:
    """Forward and backward work of the interaction of V vectors of D numbers; G = V * D.

    Dot products: flop 2 * B * D * V * (V - 1) / 2 forward and twice that backward; bytes width * B * (G + out) forward,
    width * B * (2 * G + out) backward. DCN: each cross layer has a product G x r and one r x G, flop 4 * B * G * r and
    bytes width * B * (5 * G + 2 * r) plus weights; backward twice that. Projection: two MLPs over G, and flop 2 * B * D
    * F1 * F2, with F1 and F2 their output widths divided by D.
    """
    vectors, dim = model.num_vectors, model.embedding_dim
    flat = vectors * dim
    if model.interaction_type == "original":
        pairs = vectors * (vectors - 1) // 2
        flop = 2 * samples * dim * pairs
        out = dim + pairs
        return (
            Work(flop, width * samples * (flat + out), 0, 2),
            Work(2 * flop, width * samples * (2 * flat + out), 0, 2),
        )
    if model.interaction_type == "dcn":
        rank, layers = model.dcn_low_rank_dim, model.dcn_num_layers
        flop = layers * 4 * samples * flat * rank
        num_bytes = layers * width * (samples * (5 * flat + 2 * rank) + 2 * flat * rank)
        return Work(flop, num_bytes, 0, 4 * layers), Work(2 * flop, 2 * num_bytes, 0, 8 * layers)
    branches = (model.interaction_branch1_layer_sizes, model.interaction_branch2_layer_sizes)
    forwards, backwards = zip(*(mlp_work((flat, *sizes), samples, width) for sizes in branches), strict=True)
    left, right = (sizes[-1] // dim for sizes in branches)
    flop = 2 * samples * dim * left * right
    num_bytes = width * samples * (dim * (left + right) + left * right)
    return (
        forwards[0] + forwards[1] + Work(flop, num_bytes, 0, 2),
        backwards[0] + backwards[1] + Work(2 * flop, 2 * num_bytes, 0, 4),
    )


def layer_works(model: ModelConfig, samples: int, width: int) -> dict[str, tuple[Work, Work]]:
    """Forward and backward work of the dense arch, the interaction and the over arch, by name in this order."""
    return {
        "dense": mlp_work(dense_layers(model), samples, width, needs_input_gradient=False),
        "interaction": interaction_work(model, samples, width),
        "over": mlp_work(over_layers(model), samples, width),
    }


def dense_layers(model: ModelConfig) -> tuple[int, ...]:
    """Widths of the dense arch, from the integers to the vector that interacts."""
    inputs = NUM_INTEGER_FEATURES * (2 if model.standardize_dense else 1)
    return (inputs, *model.dense_arch_layer_sizes)


def interaction_width(model: ModelConfig) -> int:
    """Outputs of the interaction per sample."""
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
    """Weights and biases of everything but the tables: both archs, the interaction, embeddings of buckets."""
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


def update_work(parameters: int, optimizer: OptimizerName) -> Work:
    """The optimizer's pass over dense parameters: it reads gradients, and reads and writes weights and their state.

    Bytes: 4 * parameters + 2 * 4 * parameters * (1 + state floats).
    """
    return Work(0, FLOAT * parameters + update_bytes(parameters, 1, state_floats(optimizer, 1)), 0, 2)


def sample_bytes(hotness: Sequence[int]) -> int:
    """Bytes of a sample in a batch: 13 integers, the ids, their 26 lengths, the label."""
    return FLOAT * NUM_INTEGER_FEATURES + ID * sum(hotness) + LENGTH * NUM_CATEGORICAL_FEATURES + LABEL
