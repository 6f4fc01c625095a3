"""What a rank's memory holds while it trains. Arithmetic only, no torch. Letters as in work.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from dlrm.config.config import ModelConfig, OptimizerName
from dlrm.cost.optimizer_state import state_floats
from dlrm.cost.work import (
    FLOAT,
    ID,
    LENGTH,
    TableWorkload,
    dense_layers,
    dense_parameters,
    over_layers,
    sample_bytes,
)

_BATCHES_IN_FLIGHT = {"base": 2, "sparse_dist": 3, "prefetch": 4}


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank's device memory.

    Attributes:
        weights: weights of the dense parts and of its parts of tables, without those in host memory.
        optimizer: optimizer state of the same.
        activations: batches, buffers of the exchanges, outputs of layers; gradients of the dense parts and of
            replicated tables.
        reserve: what the dense parts and activations leave of the reserved share.
        free: what is left for more tables; negative if activations need more than there is.
        on_host: weights and optimizer state of tables in the host's memory.
    """

    weights: float
    optimizer: float
    activations: float
    reserve: float
    free: float
    on_host: float


def memory_of_ranks(
    model: ModelConfig,
    tables: Sequence[TableWorkload],
    optimizer: OptimizerName,
    pipeline: str,
    samples: int,
    width: int,
    ranks: int,
    device_bytes: float,
    reserved_share: float,
) -> list[RankMemory]:
    """The memory of each rank.

    Tables: 4 * R * (D + state) * share. Dense parts: 4 * parameters * (1 + state). Gradients: 4 * parameters, and
    4 * R * D of each replicated table. Activations: see `_dense_activations` and `_exchange_buffers`.

    Args:
        pipeline: base, sparse_dist or prefetch; decides how many batches are in flight.
        samples: samples of a rank's batch.
        width: bytes of an activation.
        device_bytes: memory of a rank's device.
        reserved_share: share of it that is kept for dense parts and activations.
    """
    parameters = dense_parameters(model)
    weights, states, hosted = [0.0] * ranks, [0.0] * ranks, [0.0] * ranks
    for table in tables:
        for rank, share in zip(table.ranks, table.shares, strict=True):
            weights[rank] += table.weight_bytes * share * table.device_share
            states[rank] += table.state_bytes * share * table.device_share
            hosted[rank] += (table.weight_bytes + table.state_bytes) * share * (1 - table.device_share)
    buffers = _exchange_buffers(tables, samples, ranks)
    batches = _BATCHES_IN_FLIGHT[pipeline] * samples * sample_bytes([table.hotness for table in tables])
    gradients = FLOAT * parameters + sum(table.weight_bytes for table in tables if table.is_replicated)
    shared = batches + _dense_activations(model, samples, width) + gradients
    dense_state = FLOAT * parameters * state_floats(optimizer, 1)
    found = []
    for rank in range(ranks):
        held_weights = weights[rank] + FLOAT * parameters
        held_states = states[rank] + dense_state
        activations = shared + buffers[rank]
        in_reserve = activations + (FLOAT * parameters + dense_state)
        reserve = max(0.0, device_bytes * reserved_share - in_reserve)
        free = device_bytes - held_weights - held_states - activations - reserve
        found.append(RankMemory(held_weights, held_states, activations, reserve, free, hosted[rank]))
    return found


def _dense_activations(model: ModelConfig, samples: int, width: int) -> float:
    """Bytes of the activations that the backward pass needs, and of the largest gradients beside them.

    width * B * (outputs of all layers + 2 * V * D + 2 * widest layer). 2 * V * D are the interacting vectors and their
    gradients; 2 * widest layer are the incoming and the outgoing gradient of a layer.
    """
    flat = model.num_vectors * model.embedding_dim
    kept = [*dense_layers(model)[1:], *over_layers(model)]
    if model.interaction_type == "dcn":
        kept += [2 * flat + model.dcn_low_rank_dim] * model.dcn_num_layers
    if model.interaction_type == "projection":
        kept += chain(model.interaction_branch1_layer_sizes, model.interaction_branch2_layer_sizes)
    return width * samples * (sum(kept) + 2 * flat + 2 * max(kept))


def _exchange_buffers(tables: Sequence[TableWorkload], samples: int, ranks: int) -> list[float]:
    """Bytes of the exchanges' buffers, by rank.

    A rank keeps the ids and lengths of two batches, from all ranks, for each table that it holds; pooled rows of all
    ranks' samples for these tables, with their gradients; and pooled rows of all tables for its own samples, with their
    gradients. Each table held: 2 * W * (4 * B * H / row_splits + 4 * B) + W * B * columns * (pooled + gradient bytes).
    Each table: B * D * (pooled + gradient bytes).
    """
    own = sum(samples * table.dim * (table.pooled_bytes + table.gradient_bytes) for table in tables)
    sizes = [float(own)] * ranks
    for table in tables:
        everyone = samples * (1 if table.is_replicated else ranks)
        ids = 2 * everyone * (ID * table.hotness / table.row_splits + LENGTH)
        for rank, share in zip(table.ranks, table.shares, strict=True):
            sizes[rank] += ids + everyone * table.columns(share) * (table.pooled_bytes + table.gradient_bytes)
    return sizes
