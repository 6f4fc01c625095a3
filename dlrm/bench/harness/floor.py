"""The least time that a machine needs for a piece of work: its operations at the machine's matrix rate, its bytes at
the machine's memory bandwidth. docs/design/floor.md says what is counted, and why.

Letters: B samples, F tables, D embedding dimension, V = F + 1 vectors that interact, P = V * (V - 1) / 2 pairs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from dlrm.bench.harness.shape import state_floats
from dlrm.config.config import ModelConfig, OptimizerName
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES, NUM_INTEGER_FEATURES

FLOAT = 4
ID = 4
RECORD = FLOAT * NUM_INTEGER_FEATURES + ID * NUM_CATEGORICAL_FEATURES + FLOAT
"""Bytes of a sample: integers, ids, label."""


@dataclass(frozen=True)
class Work:
    """What can't be left out: floating point operations of matrix products, and bytes to or from memory."""

    flop: float
    num_bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flop + other.flop, self.num_bytes + other.num_bytes)


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached in the same call: operations a second of a large product, bytes a second of a copy."""

    flop_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class Floor:
    """Least seconds of some work. `seconds` assumes that products hide all memory traffic, or the other way round: the
    strict bound. `sum_seconds` assumes that neither hides the other."""

    work: Work
    ceilings: Ceilings

    @property
    def matrix_seconds(self) -> float:
        """Of the products alone."""
        return self.work.flop / self.ceilings.flop_per_second

    @property
    def memory_seconds(self) -> float:
        """Of the memory traffic alone."""
        return self.work.num_bytes / self.ceilings.bytes_per_second

    @property
    def seconds(self) -> float:
        """The larger of the two."""
        return max(self.matrix_seconds, self.memory_seconds)

    @property
    def sum_seconds(self) -> float:
        """One after the other."""
        return self.matrix_seconds + self.memory_seconds

    def to_json(self) -> dict[str, Any]:
        """For a result."""
        names = ("matrix_seconds", "memory_seconds", "seconds", "sum_seconds")
        return {**asdict(self.work), **asdict(self.ceilings), **{name: getattr(self, name) for name in names}}


def training_work(model: ModelConfig, optimizer: OptimizerName, samples: int, distinct_rows: int, width: int) -> Work:
    """A training step.

    Args:
        model: layers and tables.
        optimizer: sgd, adagrad or rowwise_adagrad.
        samples: of the step, over all ranks.
        distinct_rows: table rows that its ids name, each counted once.
        width: bytes of an activation: 4 in fp32, 2 in bf16.
    """
    return (
        _dense_training(model, optimizer, samples, width)
        + interaction_work(model, samples, width)
        + embedding_work(model.embedding_dim, optimizer, distinct_rows)
        + Work(0, samples * RECORD)
    )


def evaluation_work(model: ModelConfig, samples: int, distinct_rows: int) -> Work:
    """A forward pass. Nothing but its input must leave the caches."""
    products = 2 * samples * (_weights(dense_layers(model)) + _weights(over_layers(model)))
    dots = 2 * samples * model.embedding_dim * _pairs()
    return Work(products + dots, samples * RECORD + distinct_rows * model.embedding_dim * FLOAT)


def interaction_work(model: ModelConfig, samples: int, width: int) -> Work:
    """The dot product of each pair, and backward both of its vectors times its gradient.

    The vectors are written before and read in backward, the products likewise; the vectors' gradients are written and
    read once.
    """
    vectors = (NUM_CATEGORICAL_FEATURES + 1) * model.embedding_dim
    out = model.embedding_dim + _pairs()
    return Work(flop=6 * samples * model.embedding_dim * _pairs(), num_bytes=2 * samples * width * (2 * vectors + out))


def embedding_work(dim: int, optimizer: OptimizerName, distinct_rows: int) -> Work:
    """Looked-up rows are read; backward they and their optimizer state are read and written, once a step.

    What the lookup writes and the update reads for each sample, pooled vectors and their gradients, is in
    `interaction_work`.
    """
    return Work(0, distinct_rows * FLOAT * (3 * dim + 2 * state_floats(optimizer, dim)))


def _dense_training(model: ModelConfig, optimizer: OptimizerName, samples: int, width: int) -> Work:
    """Of each layer a product forward and two backward, less the gradient of the integers, which nobody needs.

    Every layer's output is written and read again in backward. Weights, and what the optimizer keeps of them, are read
    and written once.
    """
    dense, over = dense_layers(model), over_layers(model)
    weights = _weights(dense) + _weights(over)
    flop = 2 * samples * (3 * weights - dense[0] * dense[1])
    # The dense arch's last output is one of the vectors that interact; the over arch's input is what comes of them.
    activations = sum(dense[1:-1]) + sum(over[1:])
    copies = 1 if optimizer == "sgd" else 2
    parameters = weights + sum(dense[1:]) + sum(over[1:])
    return Work(flop, 2 * samples * width * activations + 2 * FLOAT * parameters * copies)


def dense_layers(model: ModelConfig) -> tuple[int, ...]:
    """Widths from the integers to the embedded vector."""
    return (NUM_INTEGER_FEATURES, *model.dense_arch_layer_sizes)


def over_layers(model: ModelConfig) -> tuple[int, ...]:
    """Widths from the interaction to the logit."""
    return (model.embedding_dim + _pairs(), *model.over_arch_layer_sizes)


def _weights(layers: Sequence[int]) -> int:
    return sum(inputs * outputs for inputs, outputs in pairwise(layers))


def _pairs() -> int:
    return NUM_CATEGORICAL_FEATURES * (NUM_CATEGORICAL_FEATURES + 1) // 2
