"""What a rank's memory holds while it trains. Arithmetic only, no torch. Letters as in cost.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from dlrm.config.config import ModelConfig
from dlrm.cost.work import (
    FLOAT,
    ID,
    LENGTH,
    STATE_COPIES,
    Table,
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
        weights: of its parts of tables, those in host memory left out, and of the dense parts.
        optimizer: state of the same.
        activations: batches, buffers of the exchanges, layers' outputs; gradients of the dense parts and of replicated
            tables.
        reserve: what of the reserved share the dense parts and activations leave.
        free: what more tables may take; less than nothing where activations need more than there is.
        on_host: of tables and their state, in the host's memory.
    """

    weights: float
    optimizer: float
    activations: float
    reserve: float
    free: float
    on_host: float


def memory_of_ranks(
    model: ModelConfig,
    tables: Sequence[Table],
    optimizer: str,
    pipeline: str,
    samples: int,
    width: int,
    ranks: int,
    device_bytes: float,
    reserved_share: float,
) -> list[RankMemory]:
    """Of each rank.

    Tables: 4 * R * (D + state) * share. Dense parts: 4 * parameters * (1 + state copies). Gradients: 4 * parameters,
    and 4 * R * D of each replicated table. Activations: see `_dense_activations` and `_exchange_buffers`.

    Args:
        pipeline: base, sparse_dist or prefetch, by which batches are in flight.
        samples: of a rank's batch.
        width: bytes of an activation.
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
    found = []
    for rank in range(ranks):
        held_weights = weights[rank] + FLOAT * parameters
        held_states = states[rank] + FLOAT * parameters * STATE_COPIES[optimizer]
        activations = shared + buffers[rank]
        in_reserve = activations + FLOAT * parameters * (1 + STATE_COPIES[optimizer])
        reserve = max(0.0, device_bytes * reserved_share - in_reserve)
        free = device_bytes - held_weights - held_states - activations - reserve
        found.append(RankMemory(held_weights, held_states, activations, reserve, free, hosted[rank]))
    return found


def _dense_activations(model: ModelConfig, samples: int, width: int) -> float:
    """Kept for backward, and the largest gradients beside them.

    width * B * (outputs of all layers + 2 * V * D + 2 * widest layer): the vectors that interact with their gradients,
    and a layer's incoming and outgoing gradient.
    """
    flat = model.num_vectors * model.embedding_dim
    kept = [*dense_layers(model)[1:], *over_layers(model)]
    if model.interaction_type == "dcn":
        kept += [2 * flat + model.dcn_low_rank_dim] * model.dcn_num_layers
    if model.interaction_type == "projection":
        kept += chain(model.interaction_branch1_layer_sizes, model.interaction_branch2_layer_sizes)
    return width * samples * (sum(kept) + 2 * flat + 2 * max(kept))


def _exchange_buffers(tables: Sequence[Table], samples: int, ranks: int) -> list[float]:
    """Of each rank: ids and lengths that it was sent, of two batches; pooled rows of all ranks' samples for the tables
    that it holds, and their gradients; pooled rows of all tables for its own samples, and their gradients.

    2 * W * (4 * B * H / row_splits + 4 * B) + W * B * columns * (pooled + gradient bytes) of each table held, and B * D
    * (pooled + gradient bytes) of each table.
    """
    own = sum(samples * table.dim * (table.pooled_bytes + table.gradient_bytes) for table in tables)
    sizes = [float(own)] * ranks
    for table in tables:
        everyone = samples * (1 if table.is_replicated else ranks)
        ids = 2 * everyone * (ID * table.hotness / table.row_splits + LENGTH)
        for rank, share in zip(table.ranks, table.shares, strict=True):
            sizes[rank] += ids + everyone * table.columns(share) * (table.pooled_bytes + table.gradient_bytes)
    return sizes
