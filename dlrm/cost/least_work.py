"""The least work that a benchmark's step can do: what no implementation can leave out. Arithmetic only, no torch.

The operations are those of `work.py`. The bytes are others, and this is why the floor of `dlrm bench` and the forecast
of `dlrm plan` differ: `work.py` counts what our operators read and write, one after the other; here a number counts
only if it must leave the caches, because it is needed again after a pass over the whole model. What a fused kernel
could keep in registers is free. docs/design/floor.md says what is counted, and why.
"""

from dlrm.config.config import ModelConfig, OptimizerName
from dlrm.cost.optimizer_state import state_floats
from dlrm.cost.work import (
    FLOAT,
    ID,
    LABEL,
    Work,
    dense_layers,
    dense_parameters,
    interaction_width,
    interaction_work,
    layer_works,
    mlp_work,
    over_layers,
    row_bytes,
    update_bytes,
)
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES, NUM_INTEGER_FEATURES

RECORD = FLOAT * NUM_INTEGER_FEATURES + ID * NUM_CATEGORICAL_FEATURES + LABEL
"""Bytes of a sample in a file: integers, one id per table, label."""


def least_training_work(
    model: ModelConfig, optimizer: OptimizerName, samples: int, distinct_rows: int, width: int
) -> Work:
    """Work of a training step.

    Args:
        model: layers and tables.
        optimizer: of tables and dense parts.
        samples: samples of the step, over all ranks.
        distinct_rows: table rows that the samples' ids name, each counted once.
        width: bytes of an activation: 4 in fp32, 2 in bf16.
    """
    return (
        _least_mlp_work(model, optimizer, samples, width)
        + least_interaction_work(model, samples, width)
        + least_embedding_work(model.embedding_dim, optimizer, distinct_rows)
        + Work(0, samples * RECORD)
    )


def least_evaluation_work(model: ModelConfig, samples: int, distinct_rows: int) -> Work:
    """Work of a forward pass. Only its input, samples and rows, must come from memory."""
    flop = sum(forward.flop for forward, _ in layer_works(model, samples, FLOAT).values())
    return Work(flop, samples * RECORD + row_bytes(distinct_rows, model.embedding_dim))


def least_interaction_work(model: ModelConfig, samples: int, width: int) -> Work:
    """Work of the interaction, forward and backward.

    Bytes: 2 * width * samples * (2 * V * D + outputs). The vectors and the outputs are written before, and read again
    in the backward pass; the gradients of the vectors are written and read once.
    """
    forward, backward = interaction_work(model, samples, width)
    vectors = model.num_vectors * model.embedding_dim
    return Work(forward.flop + backward.flop, 2 * samples * width * (2 * vectors + interaction_width(model)))


def least_embedding_work(dim: int, optimizer: OptimizerName, distinct_rows: int) -> Work:
    """Work of lookup and update: rows are read, then rows and their optimizer state are read and written once.

    The pooled rows that the lookup writes, and their gradients that the update reads, are in `least_interaction_work`.
    """
    read = row_bytes(distinct_rows, dim)
    return Work(0, read + update_bytes(distinct_rows, dim, state_floats(optimizer, dim)))


def _least_mlp_work(model: ModelConfig, optimizer: OptimizerName, samples: int, width: int) -> Work:
    """Work of both MLPs and the dense update.

    Bytes: each layer's output is written, and read again in the backward pass: 2 * width * samples * outputs. Dense
    weights and their optimizer state are read and written once.
    """
    dense, over = dense_layers(model), over_layers(model)
    works = (
        *mlp_work(dense, samples, width, needs_input_gradient=False),
        *mlp_work(over, samples, width),
    )
    # The dense arch's last output is one of the interacting vectors; the over arch's input is the interaction's output.
    outputs = sum(dense[1:-1]) + sum(over[1:])
    updated = update_bytes(dense_parameters(model), 1, state_floats(optimizer, 1))
    return Work(sum(work.flop for work in works), 2 * samples * width * outputs + updated)
