"""What a step can't do without, counted by hand."""

import pytest

from dlrm.bench.harness.floor import Ceilings, Floor
from dlrm.bench.harness.shape import make_model
from dlrm.config.config import ModelConfig
from dlrm.cost.least_work import (
    least_embedding_work,
    least_evaluation_work,
    least_interaction_work,
    least_training_work,
)
from dlrm.cost.work import Work

SPEC = make_model((100_000,) * 26)
SMALL = ModelConfig(num_embeddings=10, embedding_dim=4, dense_arch_layer_sizes=(8, 4), over_arch_layer_sizes=(16, 1))


def test_operations_of_the_specs_shape():
    # Weights: 13*512 + 512*256 + 256*128 = 170,496; pairs 27*26/2 = 351;
    # (128+351)*1024 + 1024*1024 + 1024*512 + 512*256 + 256 = 2,194,688.
    # Six operations a weight, less the gradient of 13 integers; six for each of 128 factors of a pair.
    work = least_training_work(SPEC, "sgd", samples=1, distinct_rows=26, width=4)
    assert work.flop == 6 * (170_496 + 2_194_688) - 2 * 13 * 512 + 6 * 128 * 351
    assert work.flop == pytest.approx(14.5e6, rel=0.01)
    assert least_training_work(SPEC, "sgd", 4096, 26, 4).flop == 4096 * work.flop


def test_bytes_of_a_small_step():
    samples, rows = 10, 7
    record = samples * 4 * (13 + 26 + 1)
    vectors, pairs = 27 * 4, 351
    interaction = samples * 2 * (vectors * 2 + vectors * 2 + (4 + pairs) * 2)  # written, read; so are gradients
    layers = samples * 2 * 2 * (8 + 16 + 1)
    parameters = 13 * 8 + 8 * 4 + (4 + pairs) * 16 + 16 + (8 + 4 + 16 + 1)
    sgd = least_training_work(SMALL, "sgd", samples, rows, width=2)
    assert sgd.num_bytes == record + interaction + layers + 2 * 4 * parameters + rows * 4 * 3 * 4
    rowwise = least_training_work(SMALL, "rowwise_adagrad", samples, rows, width=2)
    assert rowwise.num_bytes == sgd.num_bytes + 2 * 4 * parameters + rows * 2 * 4
    adagrad = least_training_work(SMALL, "adagrad", samples, rows, width=2)
    assert adagrad.num_bytes == sgd.num_bytes + 2 * 4 * parameters + rows * 2 * 4 * 4


def test_parts():
    assert least_embedding_work(128, "sgd", distinct_rows=1) == Work(0, 3 * 512)
    assert least_embedding_work(128, "rowwise_adagrad", distinct_rows=10) == Work(0, 10 * (3 * 512 + 8))
    assert least_interaction_work(SMALL, 1, 4) == Work(6 * 4 * 351, 4 * (2 * 2 * 108 + 2 * 355))
    forward = least_evaluation_work(SMALL, samples=2, distinct_rows=5)
    assert forward == Work(2 * 2 * (13 * 8 + 8 * 4 + 355 * 16 + 16) + 2 * 2 * 4 * 351, 2 * 160 + 5 * 16)


def test_floor_is_the_larger_of_the_two():
    floor = Floor(Work(flop=20.0, num_bytes=30.0), Ceilings(flop_per_second=10.0, bytes_per_second=10.0))
    assert (floor.matrix_seconds, floor.memory_seconds) == (2.0, 3.0)
    assert (floor.seconds, floor.sum_seconds) == (3.0, 5.0)
    assert floor.to_json()["seconds"] == 3.0
